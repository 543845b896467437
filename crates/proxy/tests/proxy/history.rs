//! However the objects came to be what they are, the kernel holds what a fresh start would write; failures on the way
//! and restarts change nothing.

use linux::{iptables, ipvs, nft};
use proxy::dataplane::iptables::Iptables;
use proxy::dataplane::ipvs::Ipvs;
use proxy::dataplane::nftables::Nftables;
use proxy::dataplane::{Change, Dataplane};
use services::ServiceTable;

use crate::cases::{node, objects, whole};

/// Numbers that look random and are the same every time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

/// One random event.
fn step(table: &mut ServiceTable, dice: &mut Dice) -> services::Changes {
    let service = dice.below(5);
    let name = format!("s{service}");
    let ip = format!("10.96.0.{},fd00:10:96::{}", 10 + service, 10 + service);
    match dice.below(6) {
        0 => table.delete_service("default", &name),
        1 => table.delete_slice("default", &format!("{name}-IPv4-8080")),
        2 | 3 => {
            let options = [
                "",
                "nodePort=30100",
                "nodePort=30101 external=Local",
                "affinity=60",
                "internal=Local",
                // Two Services may claim this one address.
                "externalIPs=198.51.100.7",
                "balancer=198.51.100.8 sources=203.0.113.0/24,203.0.113.128/25,192.168.49.0/24",
            ];
            let line = format!("service {name} {ip} 80/TCP {}", options[dice.below(options.len())]);
            let (services, _) = objects(&[&line]);
            table.upsert_service(services[0].to_string().as_bytes()).expect("a valid Service")
        }
        _ => {
            let mut lines = vec![format!("service {name} {ip} 80/TCP")];
            for host in 0..dice.below(5) {
                let state = ["", "", "", "notReady", "terminating"][dice.below(5)];
                let host = 1 + host * 2 + dice.below(2);
                lines.push(format!("endpoint {name} 10.244.{}.{host}:8080 node-{} {state}", host % 2, 1 + host % 2));
            }
            let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
            let (_, slices) = objects(&lines);
            match slices.first() {
                Some(slice) => table.upsert_slice(slice.to_string().as_bytes()).expect("a valid EndpointSlice"),
                None => table.delete_slice("default", &format!("{name}-IPv4-8080")),
            }
        }
    }
}

/// Plays events and commits each, again if it fails; then compares with a fresh start.
fn play<D: Dataplane>(mut dataplane: D, mut fresh: D, dump: impl Fn(&mut D, &ServiceTable) -> String) {
    let node = node();
    let mut dice = Dice(7);
    let mut table = ServiceTable::new();
    table.set_synced();
    while dataplane.commit(Some(&D::base(&node)), &[]).is_err() {}
    for round in 0..430 {
        let changes: Vec<_> = step(&mut table, &mut dice)
            .frontends
            .iter()
            .map(|change| Change {
                id: change.id,
                before: change.before.as_ref().map(|before| D::entries(before, &node)),
                after: change.after.as_ref().map(|after| D::entries(after, &node)),
            })
            .collect();
        let mut tries = 0;
        while let Err(error) = dataplane.commit(None, &changes) {
            tries += 1;
            assert!(tries < 3, "round {round}: {error}");
        }
        if round % 50 == 49 {
            dataplane.read().expect("read");
            while dataplane.commit(Some(&D::base(&node)), &whole::<D>(&table, &node)).is_err() {}
        }
    }
    while fresh.commit(Some(&D::base(&node)), &whole::<D>(&table, &node)).is_err() {}
    assert_eq!(dump(&mut dataplane, &table), dump(&mut fresh, &table));
}

#[test]
fn nftables_ends_where_a_fresh_start_does() {
    let fake = || Nftables::new(nft::Fake::failing(3));
    play(fake(), fake(), |dataplane, table| {
        // Chains that nothing leads to may stay; nothing else may be left to do.
        let idle = dataplane.idle_classes();
        let before = dataplane.nft().changed;
        let base = Nftables::<nft::Fake>::base(&node());
        while dataplane.commit(Some(&base), &whole::<Nftables<nft::Fake>>(table, &node())).is_err() {}
        assert_eq!(dataplane.nft().changed - before, idle as u64, "more than idle chains was left");
        dataplane.nft().dump()
    });
}

#[test]
fn iptables_ends_where_a_fresh_start_does() {
    let fake = || Iptables::new(iptables::Fake::failing(3));
    play(fake(), fake(), |dataplane, _| {
        let mut text = String::new();
        for v6 in [false, true] {
            for table in [iptables::Table::Filter, iptables::Table::Nat] {
                text += &dataplane.kernel().dump(v6, table);
            }
        }
        text
    });
}

#[test]
fn ipvs_ends_where_a_fresh_start_does() {
    let fake = || Ipvs::new(ipvs::Fake::failing(101), nft::Fake::failing(7));
    play(fake(), fake(), |dataplane, _| {
        let (ipvs, nft) = dataplane.kernel();
        ipvs.dump() + &nft.dump()
    });
}

/// One changed endpoint of a Service with many is one element, and a restart is none.
#[test]
fn a_changed_endpoint_costs_one_element() {
    let node = node();
    let line = |host: u32| format!("endpoint web 10.244.{}.{}:8080 node-2", 1 + host / 200, 1 + host % 200);
    let service = "service web 10.96.0.10 80/TCP nodePort=30080".to_owned();
    let slice = |hosts: &[u32]| {
        let lines: Vec<String> = std::iter::once(service.clone()).chain(hosts.iter().map(|host| line(*host))).collect();
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        objects(&lines)
    };
    let all: Vec<u32> = (0..300).collect();
    let (services, slices) = slice(&all);
    let mut table = ServiceTable::new();
    table.upsert_service(services[0].to_string().as_bytes()).expect("service");
    table.upsert_slice(slices[0].to_string().as_bytes()).expect("slice");
    table.set_synced();
    let mut dataplane = Nftables::new(nft::Fake::default());
    let base = Nftables::<nft::Fake>::base(&node);
    dataplane.commit(Some(&base), &whole::<Nftables<nft::Fake>>(&table, &node)).expect("commit");

    // Replaced: one slot is rewritten (an element removed and one added).
    let mut others = all.clone();
    others[100] = 301;
    let changes = table.upsert_slice(slice(&others).1[0].to_string().as_bytes()).expect("slice");
    let entries = |frontend: &services::Frontend| Nftables::<nft::Fake>::entries(frontend, &node);
    let change = &changes.frontends[0];
    let change = Change {
        id: change.id,
        before: change.before.as_ref().map(|before| entries(before)),
        after: change.after.as_ref().map(|after| entries(after)),
    };
    let before = dataplane.nft().changed;
    dataplane.commit(None, &[change]).expect("commit");
    assert!(dataplane.nft().changed - before <= 4, "{} elements changed", dataplane.nft().changed - before);

    // A restart, with a table seeded from the kernel, whose list comes in another order.
    let fake = dataplane.nft().clone();
    let mut again = Nftables::new(fake);
    let mut table = ServiceTable::with_seed(again.read().expect("read"));
    table.upsert_slice(slice(&others).1[0].to_string().as_bytes()).expect("slice");
    table.upsert_service(services[0].to_string().as_bytes()).expect("service");
    table.set_synced();
    let before = again.nft().changed;
    again.commit(Some(&base), &whole::<Nftables<nft::Fake>>(&table, &node)).expect("commit");
    assert_eq!(again.nft().changed, before, "a restart changes nothing");
}
