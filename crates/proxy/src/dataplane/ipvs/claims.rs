//! Who wants which item. Frontends share items (a cluster IP has several ports, a pod several Services), and may claim the
//! same address although they should not: the oldest has it, the next follows when it goes.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use services::FrontendId;

use super::plan::{Content, Entries, Item};
use crate::dataplane::Change;

type Wanted = Vec<(FrontendId, Content)>;

#[derive(Default)]
pub struct Claims(HashMap<Item, Wanted>);

/// The claims of the items that a commit touches, as they will be once it has succeeded.
pub struct Touched(BTreeMap<Item, Wanted>);

impl Claims {
    /// With `whole`, the changes are all there is.
    pub fn touch(&self, changes: &[Change<Entries>], whole: bool) -> Touched {
        let mut touched = Touched(BTreeMap::new());
        let nothing = Entries::default();
        for Change { id, before, after } in changes {
            let after = after.as_ref().unwrap_or(&nothing);
            let gone = before.iter().flat_map(|before| before.items.keys());
            for item in gone.filter(|item| !after.items.contains_key(item)) {
                touched.of(item, self).retain(|(owner, _)| owner != id);
            }
            for (item, content) in &after.items {
                let wanted = touched.of(item, self);
                match wanted.binary_search_by_key(id, |(owner, _)| *owner) {
                    Ok(at) => wanted[at].1 = content.clone(),
                    Err(at) => wanted.insert(at, (*id, content.clone())),
                }
            }
        }
        if whole {
            let known: BTreeSet<FrontendId> = changes.iter().map(|change| change.id).collect();
            for item in self.0.keys() {
                touched.of(item, self).retain(|(owner, _)| known.contains(owner));
            }
        }
        touched
    }

    /// Takes the claims over; the kernel has them.
    pub fn settle(&mut self, touched: Touched) {
        for (item, wanted) in touched.0 {
            if wanted.is_empty() {
                self.0.remove(&item);
            } else {
                self.0.insert(item, wanted);
            }
        }
    }

    pub fn items(&self) -> impl Iterator<Item = &Item> {
        self.0.keys()
    }
}

impl Touched {
    fn of(&mut self, item: &Item, claims: &Claims) -> &mut Wanted {
        self.0.entry(item.clone()).or_insert_with(|| claims.0.get(item).cloned().unwrap_or_default())
    }

    /// Looks at these items too, although no change names them.
    pub fn include<'a>(&mut self, items: impl Iterator<Item = &'a Item>, claims: &Claims) {
        for item in items {
            self.of(item, claims);
        }
    }

    /// Each item with what it is to be.
    pub fn wanted(&self) -> impl Iterator<Item = (&Item, Option<&Content>)> {
        self.0.iter().map(|(item, wanted)| (item, wanted.first().map(|(_, content)| content)))
    }
}
