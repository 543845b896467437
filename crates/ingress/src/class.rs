//! Which Ingresses are ours to serve.

use std::collections::BTreeMap;

use crate::objects::{Ingress, IngressClass};

/// What an IngressClass of ours names as its controller.
pub const CONTROLLER: &str = "fairlead.io/ingress";
/// The class that `fairlead` clusters have from the start.
pub const CLASS: &str = "fairlead";

const LEGACY: &str = "kubernetes.io/ingress.class";
const IS_DEFAULT: &str = "ingressclass.kubernetes.io/is-default-class";

/// The IngressClasses of the cluster, by name.
#[derive(Default)]
pub struct Classes {
    controller: String,
    all: BTreeMap<String, IngressClass>,
}

impl Classes {
    /// Serves classes whose `spec.controller` is this.
    pub fn new(controller: &str) -> Self {
        Classes { controller: controller.to_owned(), all: BTreeMap::new() }
    }

    pub fn insert(&mut self, class: IngressClass) {
        self.all.insert(class.metadata.name.clone(), class);
    }

    pub fn remove(&mut self, name: &str) {
        self.all.remove(name);
    }

    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.all.retain(|name, _| keep(name));
    }

    /// The annotation is deprecated and comes before the field, as the API's documentation asks; without either the default
    /// class counts. Of several defaults the newest is meant, as in the admission plugin DefaultIngressClass.
    pub fn is_ours(&self, ingress: &Ingress) -> bool {
        match ingress.annotation(LEGACY).or(ingress.spec.ingress_class_name.as_deref()) {
            Some(name) => self.is_our_class(name),
            None => {
                let defaults = self.all.values().filter(|class| is_default(class));
                // The name decides between those of one second.
                let newest = defaults.max_by(|a, b| {
                    let created = |class: &&IngressClass| class.metadata.creation_timestamp.clone();
                    created(a).cmp(&created(b)).then_with(|| b.metadata.name.cmp(&a.metadata.name))
                });
                newest.is_some_and(|class| class.spec.controller == self.controller)
            }
        }
    }

    fn is_our_class(&self, name: &str) -> bool {
        match self.all.get(name) {
            Some(class) => class.spec.controller == self.controller,
            // The annotation is older than IngressClass objects, and names one that there need not be.
            None => name == CLASS && self.controller == CONTROLLER,
        }
    }
}

fn is_default(class: &IngressClass) -> bool {
    class.metadata.annotations.get(IS_DEFAULT).is_some_and(|value| value == "true")
}
