//! Two sessions that speak with each other without a network, and one that hears what a peer may say.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use loadbalancer::bgp::attribute::Attribute;
use loadbalancer::bgp::capability::{Capability, Family};
use loadbalancer::bgp::message::{Message, Open, Update};
use loadbalancer::bgp::session::{Action, Event, PeerAs, Session, Settings};
use loadbalancer::bgp::update::{Frame, Path, Routes, updates};

const START: Duration = Duration::ZERO;

fn settings(local_as: u32, peer_as: u32, id: u8) -> Settings {
    let v6: IpAddr = format!("2001:db8::{id}").parse().expect("an address");
    Settings {
        local_as,
        peer_as: PeerAs::Number(peer_as),
        router_id: [192, 0, 2, id].into(),
        hold_time: Duration::from_secs(90),
        keepalive: None,
        connect_retry: Duration::from_secs(5),
        families: BTreeSet::from([Family::Ipv4, Family::Ipv6]),
        next_hops: BTreeMap::from([(Family::Ipv4, IpAddr::from([192, 0, 2, id])), (Family::Ipv6, v6)]),
        is_passive: false,
        restart_time: None,
    }
}

fn routes(nets: &[&str]) -> Routes {
    nets.iter().map(|net| (net.parse().expect("a range"), Path::default())).collect()
}

/// The messages among actions.
fn messages(actions: &[Action], wide: bool) -> Vec<Message> {
    let sent = actions.iter().filter_map(|one| if let Action::Send(bytes) = one { Some(bytes) } else { None });
    sent.map(|bytes| Message::decode(bytes, wide).expect("a good message")).collect()
}

/// Lets two sessions talk until both have said all; everything that each did.
fn talk(a: &mut Session, b: &mut Session, first: [Vec<Action>; 2], now: Duration) -> [Vec<Action>; 2] {
    let mut all: [Vec<Action>; 2] = [Vec::new(), Vec::new()];
    let mut fresh = first;
    while fresh.iter().any(|actions| !actions.is_empty()) {
        let [of_a, of_b] = std::mem::take(&mut fresh);
        for (actions, to, place) in [(&of_a, &mut *b, 1), (&of_b, &mut *a, 0)] {
            for action in actions {
                let event = match action {
                    Action::Send(bytes) => Event::Received(bytes),
                    Action::Close => Event::Closed,
                    _ => continue,
                };
                fresh[place].extend(to.handle(event, now));
            }
        }
        all[0].extend(of_a);
        all[1].extend(of_b);
    }
    all
}

/// Connects both, as the network would.
fn connect(a: &mut Session, b: &mut Session, now: Duration) -> [Vec<Action>; 2] {
    for session in [&mut *a, &mut *b] {
        let asked = session.tick(now);
        assert!(asked.is_empty() || asked == [Action::Connect]);
    }
    let first = [
        a.handle(Event::Connected([192, 0, 2, 1].into()), now),
        b.handle(Event::Connected([192, 0, 2, 2].into()), now),
    ];
    talk(a, b, first, now)
}

#[test]
fn a_session_comes_up_tells_routes_and_changes() {
    let mut node = Session::new(settings(65000, 65001, 1), START);
    let mut router = Session::new(Settings { is_passive: true, ..settings(65001, 65000, 2) }, START);
    node.set_routes(routes(&["198.51.100.1/32", "2001:db8:1::1/128"]));
    let [said, _] = connect(&mut node, &mut router, START);
    assert!(node.is_established() && router.is_established());
    let told = messages(&said, true);
    let updates: Vec<&Update> =
        told.iter().filter_map(|one| if let Message::Update(update) = one { Some(update) } else { None }).collect();
    assert_eq!(updates.len(), 4, "a route and the end of each family: {updates:?}");
    assert_eq!(updates[0].announced, ["198.51.100.1/32".parse().expect("a range")]);
    assert!(updates[0].attributes.contains(&Attribute::NextHop([192, 0, 2, 1].into())));
    assert!(updates[0].attributes.contains(&Attribute::AsPath(vec![(2, vec![65000])])));
    assert!(!updates[0].attributes.iter().any(|one| matches!(one, Attribute::LocalPref(_))), "not to another AS");
    assert!(updates[1].attributes.iter().any(|one| matches!(one, Attribute::Reach(Family::Ipv6, ..))));
    assert_eq!(*updates[2], Update::end_of_rib(Family::Ipv4));
    assert_eq!(node.counts(), (2, 2));

    // The same again says nothing; one less is withdrawn.
    assert_eq!(node.set_routes(routes(&["198.51.100.1/32", "2001:db8:1::1/128"])), []);
    let less = messages(&node.set_routes(routes(&["2001:db8:1::1/128"])), true);
    let withdrawn = Update { withdrawn: vec!["198.51.100.1/32".parse().expect("a range")], ..Update::default() };
    assert_eq!(less, [Message::Update(withdrawn)]);

    // The peer asks for all of a family again.
    let again = node.handle(Event::Received(&Message::RouteRefresh(2, 1).encode(true)), START);
    assert_eq!(messages(&again, true).len(), 1);

    // Administrative end.
    let last = node.stop();
    let [_, heard] = talk(&mut node, &mut router, [last, Vec::new()], START);
    assert!(heard.iter().any(|one| matches!(one, Action::Down(why) if why.contains("administrative shutdown"))));
    assert_eq!(node.next(), None);
}

#[test]
fn silence_ends_a_session_and_keepalives_prevent_it() {
    let short = |settings: Settings| Settings { hold_time: Duration::from_secs(9), ..settings };
    let mut node = Session::new(short(settings(65000, 65000, 1)), START);
    let mut router = Session::new(settings(65000, 65000, 2), START);
    let [said, _] = connect(&mut node, &mut router, START);
    assert!(said.contains(&Action::Up));
    // The shorter hold time counts for both: a keepalive is due each third of it.
    let mut now = START;
    for _ in 0..10 {
        now = router.next().expect("a keepalive is due");
        let both = [node.tick(now), router.tick(now)];
        assert!(both.iter().any(|actions| !actions.is_empty()));
        talk(&mut node, &mut router, both, now);
    }
    assert!(now >= Duration::from_secs(15) && node.is_established(), "{now:?}");
    // From now on the router is silent.
    let mut ended = Vec::new();
    while ended.is_empty() {
        now = node.next().expect("something is due");
        ended = node.tick(now);
        ended.retain(|one| !matches!(one, Action::Send(bytes) if bytes.len() == 19));
    }
    assert_eq!(ended[1..], [Action::Close, Action::Down("hold timer expired (4/0)".into())]);
    // It tries again.
    let at = node.next().expect("another try");
    assert_eq!(at, now + Duration::from_secs(5));
    assert_eq!(node.tick(at), [Action::Connect]);
}

#[test]
fn who_is_not_meant_is_told_so() {
    let same_id = Settings { router_id: [192, 0, 2, 1].into(), ..settings(65000, 65000, 2) };
    let internal = Settings { peer_as: PeerAs::Internal, ..settings(65000, 0, 1) };
    let external = Settings { peer_as: PeerAs::External, ..settings(65000, 0, 1) };
    let hasty = Settings { hold_time: Duration::from_secs(2), ..settings(65001, 65000, 2) };
    for (node, router, why) in [
        (settings(65000, 65001, 1), settings(65002, 65000, 2), "bad peer AS"),
        (settings(65000, 65000, 1), same_id, "bad BGP identifier"),
        (internal, settings(65001, 65000, 2), "bad peer AS"),
        (external, settings(65000, 65000, 2), "bad peer AS"),
        (settings(65000, 65001, 1), hasty, "unacceptable hold time"),
    ] {
        let (mut node, mut router) = (Session::new(node, START), Session::new(router, START));
        let [_, heard] = connect(&mut node, &mut router, START);
        let is_told = |one: &Action| matches!(one, Action::Down(reason) if reason.contains(why));
        assert!(heard.iter().any(is_told), "{why}: {heard:?}");
        assert!(!node.is_established());
    }
}

#[test]
fn what_comes_at_the_wrong_time_ends_the_session() {
    let fresh = || {
        let mut node = Session::new(settings(65000, 65001, 1), START);
        node.tick(START);
        node.handle(Event::Connected([192, 0, 2, 1].into()), START);
        node
    };
    let early = fresh().handle(Event::Received(&Message::Update(Update::default()).encode(true)), START);
    assert!(early.iter().any(|one| matches!(one, Action::Down(why) if why.contains("(5/1)"))), "{early:?}");
    // A message in two parts is one; nonsense is answered with what is wrong.
    let keepalive = Message::Keepalive.encode(true);
    let mut node = fresh();
    assert_eq!(node.handle(Event::Received(&keepalive[..10]), START), []);
    assert!(!node.handle(Event::Received(&keepalive[10..]), START).is_empty());
    let nonsense = fresh().handle(Event::Received(&[0; 19]), START);
    assert!(nonsense.iter().any(|one| matches!(one, Action::Down(why) if why.contains("(1/1)"))), "{nonsense:?}");
    // BFD's word ends what is up, and nothing else.
    assert_eq!(fresh().handle(Event::Unreachable, START), []);
}

/// A router of before RFC 6793 and 4760.
#[test]
fn an_old_router_is_told_what_it_understands() {
    let mut node = Session::new(settings(4_200_000_000, 65001, 1), START);
    node.set_routes(routes(&["198.51.100.1/32", "2001:db8:1::1/128"]));
    node.tick(START);
    node.handle(Event::Connected([192, 0, 2, 1].into()), START);
    let open = Open { asn: 65001, hold_time: 90, router_id: [192, 0, 2, 2].into(), capabilities: Vec::new() };
    node.handle(Event::Received(&Message::Open(open).encode(false)), START);
    let said = node.handle(Event::Received(&Message::Keepalive.encode(false)), START);
    let told = messages(&said, false);
    let Message::Update(update) = &told[0] else { panic!("{told:?}") };
    assert!(update.attributes.contains(&Attribute::AsPath(vec![(2, vec![23456])])));
    assert!(update.attributes.contains(&Attribute::As4Path(vec![(2, vec![4_200_000_000])])));
    assert_eq!(told.len(), 2, "no IPv6: {told:?}");
}

/// RFC 4724: the first OPEN of a process says that it has started again; at its end the peer hears nothing.
#[test]
fn a_graceful_restart_keeps_routes() {
    let graceful = Settings { restart_time: Some(Duration::from_secs(120)), ..settings(65000, 65001, 1) };
    let mut node = Session::new(graceful, START);
    let mut router = Session::new(settings(65001, 65000, 2), START);
    let restarted = |actions: &[Action]| {
        let opens = messages(actions, true).into_iter().filter_map(|one| match one {
            Message::Open(open) => Some(open),
            _ => None,
        });
        let all: Vec<Capability> = opens.flat_map(|open| open.capabilities).collect();
        all.iter().any(|one| matches!(one, Capability::GracefulRestart { restarted: true, seconds: 120, .. }))
    };
    let [said, _] = connect(&mut node, &mut router, START);
    assert!(restarted(&said), "{said:?}");
    node.handle(Event::Closed, START);
    router.handle(Event::Closed, START);
    let [said, _] = connect(&mut node, &mut router, Duration::from_secs(5));
    assert!(node.is_established() && !restarted(&said));
    assert_eq!(node.stop(), [Action::Close]);
}

#[test]
fn many_routes_fit_into_messages() {
    let many: Routes = (0..10_000u32)
        .map(|n| {
            let address = IpAddr::from((0x0a00_0000 + n).to_be_bytes());
            let community = BTreeSet::from([n % 2]);
            (ipnet::IpNet::from(address), Path { communities: community, ..Path::default() })
        })
        .collect();
    let frame = Frame {
        local_as: 65000,
        is_internal: false,
        is_wide: true,
        next_hops: BTreeMap::from([(Family::Ipv4, IpAddr::from([192, 0, 2, 1]))]),
    };
    let all = updates(&Routes::new(), &many, &frame);
    assert!(all.len() < 20, "{} messages", all.len());
    assert!(all.iter().all(|one| Message::Update(one.clone()).encode(true).len() <= 4096));
    assert_eq!(all.iter().map(|one| one.announced.len()).sum::<usize>(), 10_000);
    let none = updates(&many, &Routes::new(), &frame);
    assert_eq!(none.iter().map(|one| one.withdrawn.len()).sum::<usize>(), 10_000);
}
