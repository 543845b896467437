//! The ebpf mode's second way: packets of pods whose sockets its programs did not see, such as those of raw sockets.

use linux::bpf::Fake;
use proxy::dataplane::Dataplane;
use proxy::dataplane::ebpf::{Ebpf, LAYOUTS, Way};

use crate::case::{self, Objects};
use crate::cases::{expected, fates};
use crate::modes::whole;

/// Packets of pods are translated as netfilter would: every case holds to the letter.
#[test]
fn packets_of_pods_are_served_without_their_sockets() {
    let mut seen = 0;
    for case in case::all() {
        for step in &case.steps {
            let objects = Objects::parse(&step.objects);
            let mut ebpf = Ebpf::new(Fake::new(&LAYOUTS));
            let (table, node) = (objects.table(), objects.node);
            let base = Ebpf::<Fake>::base(&node);
            ebpf.commit(Some(&base), &whole::<Ebpf<Fake>>(&table, &node)).expect("commit");
            let of_pods = |trace: &&case::Trace| base.is_pod(trace.packet.from.ip());
            for trace in step.traces.iter().filter(of_pods) {
                let found = fates(|draw| ebpf.walk(Way::Arrive, &trace.packet, draw, &mut Vec::new()));
                let mut expected = expected(&trace.outcome(proxy::Mode::Ebpf), &trace.packet);
                expected.sort();
                assert_eq!(found.into_keys().collect::<Vec<_>>(), expected, "{}: {}", case.title, trace.line);
                seen += 1;
            }
        }
    }
    assert!(seen > 20, "only {seen} packets of pods in all cases");
}
