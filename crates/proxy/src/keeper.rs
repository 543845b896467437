//! Keeps translated connections alive while modes come and go.
//!
//! The kernel translates the packets of a known connection only while somebody in the namespace uses nat, and knows
//! connections only while somebody uses conntrack. When the last table that does goes away, every translated connection
//! breaks, whoever translated it. So one small table of ours uses both and does nothing: its nat chains are empty, and no
//! packet comes to its rule. It stays until a node is cleaned up.

use linux::nft::{Chain, ChainKind, Error, Family, Hook, Nft, Op, Rule, Statement, Transaction, Value, ct_state};

const FAMILY: Family = Family::Inet;
pub const TABLE: &str = "fairlead-keeper";
/// Another comment is another layout.
const COMMENT: &str = "keeps translated connections alive; 1";

/// Makes sure that the table is there.
pub fn keep(nft: &mut impl Nft) -> Result<(), Error> {
    if nft.table_comment(FAMILY, TABLE)?.as_deref() == Some(COMMENT) {
        return Ok(());
    }
    let mut transaction = Transaction::new(FAMILY, TABLE);
    transaction.replace_table(COMMENT);
    for (name, hook, priority) in [("prerouting", Hook::Prerouting, -100), ("postrouting", Hook::Postrouting, 100)] {
        transaction.push(Op::AddChain(Chain::base(name, ChainKind::Nat, hook, priority)));
    }
    // A rule uses conntrack by being there.
    let rule = Rule::new([Statement::HasBits(Value::CtState, ct_state::ESTABLISHED)]);
    transaction.push(Op::AddChain(Chain::regular("unreached")));
    transaction.push(Op::AddRule { chain: "unreached".into(), rule });
    nft.commit(&transaction)
}

/// Takes the table out; whether it was there. Connections that nobody else keeps break.
pub fn remove(nft: &mut impl Nft) -> Result<bool, Error> {
    nft.remove_table(FAMILY, TABLE)
}
