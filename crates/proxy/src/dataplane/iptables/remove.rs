//! Takes kube-proxy's chains out of iptables, when another mode has taken over.

use linux::iptables::{Error, Iptables, Restore, Rule, Table, TableRestore};

use super::base::Base;
use super::names::{
    EXTERNAL_SERVICES, FORWARD, KUBELET_FIREWALL, MARK_MASQ, NODE_PORTS, POSTROUTING, PROXY_FIREWALL, SERVICES,
    is_of_a_service,
};
use crate::NodeView;

/// Chains that are ours although they belong to no single Service. `KUBE-FIREWALL` is kubelet's and stays.
const SHARED: [&str; 7] = [SERVICES, EXTERNAL_SERVICES, FORWARD, NODE_PORTS, PROXY_FIREWALL, POSTROUTING, MARK_MASQ];

/// Removes what is there; whether there was anything.
pub fn remove(kernel: &mut impl Iptables) -> Result<bool, Error> {
    let base = Base::new(&NodeView::default());
    let mut found = false;
    for v6 in [false, true] {
        let mut restore = Restore::default();
        for (table, input) in [(Table::Filter, &mut restore.filter), (Table::Nat, &mut restore.nat)] {
            // A kernel without this family has nothing of ours in it.
            let Ok(saved) = kernel.save(v6, table) else { continue };
            *input = removal(&base, table, v6, &saved);
        }
        if !restore.is_empty() {
            kernel.restore(v6, &restore)?;
            found = true;
        }
    }
    Ok(found)
}

fn removal(base: &Base, table: Table, v6: bool, saved: &str) -> TableRestore {
    let declared = saved.lines().filter_map(|line| line.strip_prefix(':')?.split(' ').next());
    let ours = |chain: &&str| SHARED.contains(chain) || is_of_a_service(chain);
    let chains: Vec<String> = declared.filter(ours).map(str::to_owned).collect();
    let is_there = |chain: &str, rule: &Rule| saved.lines().any(|line| line == format!("-A {chain} {rule}"));
    let jumps = base.jumps(table, v6).into_iter();
    let to_ours = jumps.filter(|(chain, rule)| {
        rule.target != linux::iptables::Target::Jump(KUBELET_FIREWALL.to_owned()) && is_there(chain, rule)
    });
    let removes = to_ours.map(|(chain, rule)| (chain.to_owned(), rule)).collect();
    TableRestore { deletes: chains.clone(), chains, removes, ..TableRestore::default() }
}
