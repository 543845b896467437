//! Every case of the case files over real sockets, asked by `dig`, and once more by `kdig`: what other people's programs
//! read is what the case says.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use dns::{DnsConfig, Feed, Listen, Server, UpstreamServer, Upstreams};
use hickory_proto::op::{Message, Metadata};
use hickory_proto::rr::{RData, Record, RecordType};
use tokio::net::UdpSocket;
use tokio::process::Command;
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::cases::{Case, parse};
use crate::zone::{RANGES, SEARCH, World, ZONE, asked};

const PATIENCE: Duration = Duration::from_secs(60);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// An upstream server that gives every name one address, and remembers what it was asked.
struct Outside {
    address: SocketAddr,
    asked: Arc<Mutex<BTreeSet<String>>>,
    task: JoinHandle<()>,
}

impl Outside {
    async fn start() -> Self {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("loopback");
        let address = socket.local_addr().expect("bound");
        let asked: Arc<Mutex<BTreeSet<String>>> = Arc::default();
        let memory = asked.clone();
        let task = tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
                let request = Message::from_vec(&buffer[..length]).expect("a message");
                let query = request.queries[0].clone();
                let line = format!("{} {}", query.name(), query.query_type());
                memory.lock().expect("unpoisoned").insert(line.to_ascii_lowercase());
                let mut reply = request.clone().into_response();
                reply.metadata = Metadata::response_from_request(&request.metadata);
                // Only what the cases are about exists: the search domains of the node do not.
                if query.name().to_ascii().to_lowercase().starts_with("www.example.com.")
                    && query.name().num_labels() > 3
                {
                    reply.metadata.response_code = hickory_proto::op::ResponseCode::NXDomain;
                } else if query.query_type() == RecordType::A {
                    reply.add_answer(Record::from_rdata(query.name().clone(), 20, RData::from(OUTSIDE)));
                }
                socket.send_to(&reply.to_vec().expect("a message"), peer).await.expect("sent");
            }
        });
        Outside { address, asked, task }
    }
}

/// Records of dig's output by section, in order, as the cases write them; and the status.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    status: String,
    authoritative: bool,
    records: Vec<String>,
}

fn read(output: &str) -> Seen {
    let mut seen = Seen::default();
    let mut section = "";
    for line in output.lines().map(str::trim) {
        // What kdig says of a transfer that it does not get.
        if line.contains("ERROR") && line.contains("'REFUSED'") {
            seen.status = "REFUSED".to_owned();
        }
        if let Some(status) = line.split("status: ").nth(1) {
            seen.status = status.split([',', ';']).next().unwrap_or_default().trim().to_owned();
        }
        if let Some(flags) = line.to_ascii_lowercase().split("flags: ").nth(1)
            && line.contains("QUERY:")
        {
            seen.authoritative =
                flags.split(';').next().is_some_and(|flags| flags.split_whitespace().any(|f| f == "aa"));
        }
        section = match line {
            ";; ANSWER SECTION:" => "",
            ";; AUTHORITY SECTION:" => "authority ",
            ";; ADDITIONAL SECTION:" => "additional ",
            _ => section,
        };
        if line.is_empty() || line.starts_with(';') {
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().filter(|word| *word != "IN").collect();
        seen.records.push(format!("{section}{}", words.join(" ").replace('"', "")));
    }
    seen
}

fn wanted(answer: &str, outside: &Mutex<BTreeSet<String>>, question: &str) -> Seen {
    let mut seen = Seen::default();
    for line in answer.lines().filter(|line| !line.is_empty()) {
        if line.starts_with("upstream ") || line.starts_with("walk ") {
            let (_, asked) = line.split_once(' ').expect("who and what");
            let asked = asked.to_ascii_lowercase();
            let held = outside.lock().expect("unpoisoned");
            assert!(held.contains(&asked), "{question}: nobody was asked {asked}, but {held:?}");
            seen.status = "NOERROR".to_owned();
            seen.authoritative = false;
            continue;
        }
        let status = match line.trim_end_matches(" (authoritative)") {
            "No Error" => "NOERROR",
            "Non-Existent Domain" => "NXDOMAIN",
            "Server Failure" => "SERVFAIL",
            "Query Refused" => "REFUSED",
            _ => {
                seen.records.push(line.to_owned());
                continue;
            }
        };
        seen.status = status.to_owned();
        seen.authoritative = line.ends_with("(authoritative)");
    }
    seen
}

/// The address that the walked or forwarded question ends at.
fn with_outside(mut seen: Seen, answer: &str, question: &str) -> Seen {
    let (name, record_type) = asked(question);
    let last = answer.trim_end().lines().last().unwrap_or_default();
    let Some((way, end)) = last.split_once(' ').filter(|(way, _)| matches!(*way, "upstream" | "walk")) else {
        return seen;
    };
    let end = end.split(' ').next().unwrap_or_default();
    if way == "walk" {
        // AAAA has nothing there, but A has: the same alias, and no address.
        seen.records.push(format!("{} 5 CNAME {end}", name.to_ascii()));
    }
    if record_type == RecordType::A {
        seen.records.push(format!("{end} 20 A {OUTSIDE}"));
    }
    seen
}

async fn ask(program: &str, server: SocketAddr, question: &str, flags: &[&str]) -> Seen {
    let (name, record_type) = question.trim().split_once(' ').expect("a name and a type");
    // A client that has a copy of the zone says which.
    let record_type = if record_type == "IXFR" { "IXFR=1" } else { record_type };
    let mut command = Command::new(program);
    command.arg(format!("@{}", server.ip())).args(["-p", &server.port().to_string()]);
    command.args([name, record_type, "+noall", "+comments", "+answer", "+authority", "+additional", "+retry=0"]);
    command.args(flags).kill_on_drop(true);
    let output = timeout(PATIENCE, command.output()).await.expect("in time").expect("bind9-dnsutils and knot-dnsutils");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    read(&text)
}

async fn play(case: &Case, common: &str, program: &str, flags: &[&str], count: &mut usize) -> Vec<String> {
    let outside = Outside::start().await;
    let world = World::of(case, common);
    let mut config = DnsConfig::new(vec![Listen::Address((Ipv4Addr::LOCALHOST, 0).into())]);
    config.upstreams = Upstreams::Servers(vec![UpstreamServer::from(outside.address)]);
    config.reverse = RANGES.iter().map(|range| range.parse().expect("a range")).collect();
    config.pods = world.pods;
    config.objects = world.objects;
    config.hosts = world.hosts;
    if !world.search.clients.is_empty() && !case.sections.iter().any(|section| section.name == "from") {
        config.search_clients = vec!["127.0.0.0/8".parse().expect("a range")];
    }
    config.search_domains = world.search.domains.iter().map(ToString::to_string).collect();
    let (_sender, changes) = broadcast::channel(8);
    let feed = Feed { table: Arc::new(RwLock::new(world.table)), changes };
    let server = Server::bind(config, feed).await.expect("loopback");
    let address = server.addresses()[0];
    let token = CancellationToken::new();
    let task = tokio::spawn(server.run(token.clone()));

    let mut problems = Vec::new();
    let mut question = String::new();
    for section in &case.sections {
        match section.name.as_str() {
            "ask" => question = section.text.trim().to_owned(),
            "answer" => {
                let found = ask(program, address, &question, flags).await;
                *count += 1;
                let wanted = with_outside(wanted(&section.text, &outside.asked, &question), &section.text, &question);
                let (mut a, mut b) = (found.records.clone(), wanted.records.clone());
                if program == "kdig" {
                    // It asks in lower case, whatever it is told.
                    b.iter_mut().for_each(|record| record.make_ascii_lowercase());
                    a.iter_mut().for_each(|record| record.make_ascii_lowercase());
                }
                // Addresses come in another order each time.
                a.sort();
                b.sort();
                if (&found.status, found.authoritative, &a) != (&wanted.status, wanted.authoritative, &b) {
                    problems.push(format!(
                        "{}: {question}\n  {program} {flags:?} found\n{found:#?}\n  wanted\n{wanted:#?}",
                        case.title
                    ));
                }
            }
            _ => {}
        }
    }
    token.cancel();
    timeout(PATIENCE, task).await.expect("the server ends").expect("without a panic");
    outside.task.abort();
    problems
}

#[tokio::test]
async fn other_programs_read_the_same_answers() {
    let (mut problems, mut count) = (Vec::new(), 0);
    let ways: [(&str, &[&str]); 3] = [
        ("dig", &["+noedns", "+ignore"]),
        ("dig", &["+tcp", "+bufsize=1232"]),
        ("kdig", &["+header", "+noidn", "+edns", "+bufsize=1232"]),
    ];
    for file in [ZONE, SEARCH] {
        let cases = parse(file);
        let common = cases[0].sections[0].text.clone();
        for (program, flags) in ways {
            for case in &cases {
                problems.extend(play(case, &common, program, flags, &mut count).await);
            }
        }
    }
    assert!(problems.is_empty(), "{} of {count} differ\n\n{}", problems.len(), problems.join("\n"));
    assert!(count > 300, "{count} questions were asked");
}
