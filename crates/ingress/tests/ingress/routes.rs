//! Plays the route cases: objects in, and for each question the way it takes.
//!
//! A case is a title (`# …`), its objects one a line (`KIND NAMESPACE/NAME {spec}`, with ` | {metadata}` behind where that
//! matters), questions with their answers (`GET http://host/path [name: value, …] -> answer`), and what is wrong
//! (`NAMESPACE/NAME REASON`). A Secret has a word for what is in it, a ConfigMap its data. `tls NAME` asks for a certificate.
//! The first case's objects stand for all others, too.

use std::collections::HashMap;
use std::sync::{Arc, RwLock};

use api::object::Key;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use ingress::gateway::CaState;
use ingress::{
    Action, Ask, CONTROLLER, Certificates, ClientAuth, Compiler, External, Filter, HeadersState, Instead, MirrorTo,
    Policy, Route, RouteTable, SecretState, SetHeaders, Slot, fallback,
};
use serde_json::{Value, json};
use services::ServiceTable;

use crate::ports::Authority;

pub const FILES: &[(&str, &str)] = &[
    ("paths.txt", include_str!("cases/paths.txt")),
    ("hosts.txt", include_str!("cases/hosts.txt")),
    ("classes.txt", include_str!("cases/classes.txt")),
    ("backends.txt", include_str!("cases/backends.txt")),
    ("tls.txt", include_str!("cases/tls.txt")),
    ("nginx.txt", include_str!("cases/nginx.txt")),
    ("annotations.txt", include_str!("cases/annotations.txt")),
    ("answers.txt", include_str!("cases/answers.txt")),
    ("clients.txt", include_str!("cases/clients.txt")),
    ("endpoints.txt", include_str!("cases/endpoints.txt")),
    ("external.txt", include_str!("cases/external.txt")),
    ("passing.txt", include_str!("cases/passing.txt")),
    ("mirrors.txt", include_str!("cases/mirrors.txt")),
    ("ours.txt", include_str!("cases/ours.txt")),
    ("together.txt", include_str!("cases/together.txt")),
];

/// The titles of a file's cases, without the first, which is about all.
pub fn titles(text: &str) -> impl Iterator<Item = String> {
    parse(text).into_iter().skip(1).map(|case| case.title)
}

pub struct Case {
    pub title: String,
    pub objects: Vec<String>,
    pub asks: Vec<(String, String)>,
    faults: Vec<String>,
    /// Of Gateway API.
    pub status: Vec<String>,
}

pub fn parse(text: &str) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let mut section = "";
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        if let Some(title) = line.strip_prefix("# ") {
            let title = title.to_owned();
            let (objects, asks, faults, status) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            cases.push(Case { title, objects, asks, faults, status });
            continue;
        }
        if let Some(name) = line.strip_prefix("-- ").and_then(|rest| rest.strip_suffix(" --")) {
            section = name;
            continue;
        }
        let case = cases.last_mut().expect("a line stands below a title");
        match section {
            "objects" => case.objects.push(line.to_owned()),
            "faults" => case.faults.push(line.to_owned()),
            "status" => case.status.push(line.to_owned()),
            "ask" => {
                let (ask, answer) = line.split_once(" -> ").unwrap_or_else(|| panic!("no answer in {line:?}"));
                case.asks.push((ask.trim().to_owned(), answer.trim().to_owned()));
            }
            other => panic!("{other:?} is no section"),
        }
    }
    cases
}

/// `KIND NAMESPACE/NAME {spec} | {metadata}`, as an object.
pub fn object(line: &str) -> Value {
    let (head, metadata) = line.split_once(" | ").unwrap_or((line, "{}"));
    let mut words = head.splitn(3, ' ');
    let (kind, name) = (words.next().expect("a kind"), words.next().expect("a name"));
    let spec: Value = serde_saphyr::from_str(words.next().unwrap_or("{}")).unwrap_or_else(|e| panic!("{e} in {line}"));
    let mut metadata: Value = serde_saphyr::from_str(metadata).unwrap_or_else(|e| panic!("{e} in {line}"));
    let (namespace, name) = name.split_once('/').unwrap_or(("", name));
    metadata["name"] = json!(name);
    metadata["namespace"] = json!(namespace);
    if kind == "EndpointSlice" {
        metadata["labels"] = json!({"kubernetes.io/service-name": name});
        let mut slice = spec;
        slice["metadata"] = metadata;
        slice["addressType"] = json!("IPv4");
        return slice;
    }
    json!({"kind": kind, "metadata": metadata, "spec": spec})
}

struct World {
    compiler: Compiler,
    routes: RouteTable,
    certificates: Certificates,
    secrets: HashMap<String, Vec<u8>>,
}

pub fn secret(names: &str) -> (SecretState, Vec<u8>) {
    let made = |names: &str| {
        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(vec![names.to_owned()]).expect("a name");
        (params.self_signed(&key).expect("a certificate"), key)
    };
    let (certificate, key) = made(names);
    let (_, other) = made(names);
    let mut data = HashMap::from([
        ("tls.crt".to_owned(), BASE64.encode(certificate.pem())),
        ("tls.key".to_owned(), BASE64.encode(key.serialize_pem())),
    ]);
    match names {
        "users" => data = HashMap::from([("auth".to_owned(), BASE64.encode("ann:{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ="))]),
        "bad-users" => data = HashMap::from([("auth".to_owned(), BASE64.encode("ann:secret"))]),
        "no-key" => drop(data.remove("tls.key")),
        "other-key" => drop(data.insert("tls.key".to_owned(), BASE64.encode(other.serialize_pem()))),
        "no-pem" => drop(data.insert("tls.crt".to_owned(), BASE64.encode("hello"))),
        _ => {}
    }
    (SecretState::of(Some(&data)), certificate.der().to_vec())
}

fn world(lines: &[&String]) -> World {
    let mut table = ServiceTable::new();
    let mut secrets: HashMap<String, (SecretState, Vec<u8>)> = HashMap::new();
    let mut config_maps: HashMap<String, HashMap<String, String>> = HashMap::new();
    let mut authorities: HashMap<String, HashMap<String, String>> = HashMap::new();
    let mut rest = Vec::new();
    for line in lines {
        if let Some(named) = line.strip_prefix("Secret ") {
            let (name, what) = named.split_once(' ').expect("a Secret and what is in it");
            if what == "authorities" || what == "bad-authorities" {
                let good = Authority::new().pem;
                let pem = if what == "authorities" { good.as_str() } else { "no certificate" };
                let data = HashMap::from([("ca.crt".to_owned(), BASE64.encode(pem))]);
                authorities.insert(name.to_owned(), data);
                continue;
            }
            secrets.insert(name.to_owned(), secret(what));
            continue;
        }
        if let Some(named) = line.strip_prefix("ConfigMap ") {
            let (name, data) = named.split_once(' ').expect("a ConfigMap and its data");
            config_maps.insert(name.to_owned(), serde_saphyr::from_str(data).expect("names and values"));
            continue;
        }
        let mut object = object(line);
        match line.split(' ').next() {
            Some("Service") => {
                if object.pointer("/spec/clusterIPs").is_none() && object.pointer("/spec/type").is_none() {
                    object["spec"]["clusterIPs"] = json!(["10.96.0.9"]);
                }
                table.upsert_service(object.to_string().as_bytes()).expect("a Service");
            }
            Some("EndpointSlice") => {
                table.upsert_slice(object.to_string().as_bytes()).expect("a slice");
            }
            Some(kind @ ("Ingress" | "IngressClass")) => rest.push((kind.to_owned(), object)),
            kind => panic!("{kind:?} is no kind of a case"),
        }
    }
    let mut compiler = Compiler::new(CONTROLLER, Arc::new(RwLock::new(table)), fallback().expect("a certificate"));
    for (kind, object) in rest {
        match kind.as_str() {
            "Ingress" => compiler.set_ingress(serde_json::from_value(object).expect("an Ingress")),
            _ => compiler.set_class(serde_json::from_value(object).expect("an IngressClass")),
        }
    }
    for key in compiler.new_config_maps().unwrap_or_default() {
        let data = config_maps.remove(&format!("{}/{}", key.namespace, key.name));
        compiler.set_config_map(&key, HeadersState::of(data.as_ref()));
    }
    for key in compiler.new_authorities().unwrap_or_default() {
        let data = authorities.remove(&format!("{}/{}", key.namespace, key.name));
        compiler.set_authorities(&key, CaState::of_secret(data.as_ref()));
    }
    let mut ders = HashMap::new();
    for key in compiler.wanted_secrets() {
        let name = format!("{}/{}", key.namespace, key.name);
        let state = match secrets.remove(&name) {
            Some((state, der)) => {
                ders.insert(name, der);
                state
            }
            None => SecretState::of(None),
        };
        compiler.set_secret(&key, state);
    }
    let routes = compiler.routes().unwrap_or_default();
    let none = || Certificates::new(fallback().expect("a certificate"));
    let certificates = compiler.certificates().unwrap_or_else(none);
    World { compiler, routes, certificates, secrets: ders }
}

impl World {
    fn answer(&self, ask: &str) -> String {
        if let Some(name) = ask.strip_prefix("tls").map(str::trim) {
            let shown = self.certificates.find(name).cert[0].to_vec();
            let known = self.secrets.iter().find(|(_, der)| **der == shown);
            return known.map_or("fallback".to_owned(), |(name, _)| name.clone());
        }
        if let Some(name) = ask.strip_prefix("TLS") {
            let Some(route) = self.routes.passes(name.trim()) else { return "ends here".to_owned() };
            let upstream = &route.backends.list()[0].upstream;
            let endpoints: Vec<String> = upstream.targets().endpoints.iter().map(|e| e.address.to_string()).collect();
            return format!("passes {} {}", upstream.key, endpoints.join(","));
        }
        asked(ask, |ask| self.routes.find(ask).map_or("404".to_owned(), |route| say(route)))
    }
}

/// Reads `METHOD URL [name: value, …]`, and has it answered.
pub fn asked(text: &str, answer: impl FnOnce(&Ask<'_>) -> String) -> String {
    let (request, headers) = text.split_once(" [").map_or((text, ""), |(a, b)| (a, b.trim_end_matches(']')));
    let (method, url) = request.split_once(' ').expect("a method and a URL");
    let url: Uri = url.parse().expect("a URL");
    let mut map = HeaderMap::new();
    for header in headers.split(", ").filter(|header| !header.is_empty()) {
        let (name, value) = header.split_once(": ").expect("a header is name: value");
        let name = HeaderName::from_bytes(name.as_bytes()).expect("a header's name");
        map.append(name, HeaderValue::from_str(value).expect("a value"));
    }
    let (method, host) = (Method::from_bytes(method.as_bytes()).expect("a method"), url.host().unwrap_or_default());
    answer(&Ask { host, path: url.path(), query: url.query().unwrap_or_default(), method: &method, headers: &map })
}

/// Where a route leads, in one line.
pub fn say(route: &Route) -> String {
    let mut text = match &route.action {
        Action::Respond(status) => status.as_u16().to_string(),
        Action::Redirect(redirect) => {
            let to = redirect.location.as_deref().or(redirect.host.as_deref());
            format!("{} {}", redirect.status.as_u16(), to.unwrap_or_default())
        }
        Action::Forward(backends) => {
            let all = backends.list().iter().map(|one| {
                let targets = one.upstream.targets();
                let endpoints: Vec<String> = targets.endpoints.iter().map(|e| e.address.to_string()).collect();
                let share = if backends.list().len() > 1 { format!("{}*", one.weight) } else { String::new() };
                let endpoints = match &targets.name {
                    Some((name, port)) => format!("{name}:{port}"),
                    None if endpoints.is_empty() => "503".to_owned(),
                    None => endpoints.join(","),
                };
                let endpoints = match &one.instead {
                    Some(Instead::Refusal(status)) => status.as_u16().to_string(),
                    Some(Instead::Redirect(to)) => {
                        format!("{} {}", to.status.as_u16(), to.host.as_deref().unwrap_or_default())
                    }
                    None => endpoints,
                };
                let tls = one.tls.as_ref().map(|tls| format!(" as {}", tls.name.to_str())).unwrap_or_default();
                let filters: String = one.filters.iter().map(|filter| format!(" {filter:?}")).collect();
                format!("{share}{} {endpoints}{tls}{filters}", one.upstream.key)
            });
            all.collect::<Vec<_>>().join(" + ")
        }
    };
    for filter in &route.filters {
        match filter {
            Filter::RewritePath(rewrite) => text.push_str(&format!(" {rewrite:?}")),
            Filter::RewriteHost(host) => text.push_str(&format!(" host {host:?}")),
            Filter::Cors(cors) => text.push_str(&format!(" cors {}", cors.origins.join(","))),
            Filter::RequestHeaders(changes) => text.push_str(&format!(" {:?}", changes.set)),
            Filter::Redirects(one) => text.push_str(&format!(" redirects {} -> {}", one.from, one.to)),
            Filter::Mirror(mirror) => {
                let to = match &mirror.to {
                    MirrorTo::Service { upstream, .. } => upstream.key.to_string(),
                    MirrorTo::Url { wanted, place } => {
                        let of = place.upstream.as_ref().map(|upstream| format!(" of {}", upstream.key));
                        let host = wanted.host.as_ref().map(|host| format!(" as {host}"));
                        let body = if wanted.has_body { "" } else { " without bodies" };
                        format!("{}{}{}{body}", wanted.url, of.unwrap_or_default(), host.unwrap_or_default())
                    }
                };
                text.push_str(&format!(" mirror {to} {}/{}", mirror.part, mirror.whole));
            }
            other => text.push_str(&format!(" {other:?}")),
        }
    }
    if let Some(affinity) = &route.policy.affinity {
        text.push_str(&format!(" cookie {}", affinity.cookie));
    }
    if let Some(by) = &route.policy.hash_by {
        text.push_str(&format!(" by {by}"));
    }
    if let Some(limits) = &route.policy.limits {
        text.push_str(&format!(" {}/s {}/m {} at once", limits.per_second, limits.per_minute, limits.at_once));
    }
    if route.policy.https_only {
        text.push_str(" https");
    }
    if route.name.kind == "Ingress" {
        text.push_str(&treatment(&route.policy));
    }
    text
}

/// What a policy says that the default does not.
fn treatment(policy: &Policy) -> String {
    let (usual, mut text) = (Policy::default(), String::new());
    let mut tell = |is_other: bool, what: String| {
        if is_other {
            text.push(' ');
            text.push_str(&what);
        }
    };
    tell(policy.connect_timeout != usual.connect_timeout, format!("connect {:?}", policy.connect_timeout));
    tell(policy.read_timeout != usual.read_timeout, format!("read {:?}", policy.read_timeout));
    tell(policy.send_timeout != usual.send_timeout, format!("send {:?}", policy.send_timeout));
    tell(policy.body_limit != usual.body_limit, format!("body {}", policy.body_limit));
    tell(policy.balance != usual.balance, format!("{:?}", policy.balance));
    tell(policy.protocol != usual.protocol, format!("{:?}", policy.protocol));
    tell(policy.allow != usual.allow, format!("allow {:?}", policy.allow));
    tell(policy.deny != usual.deny, format!("deny {:?}", policy.deny));
    if let Some(basic) = &policy.basic {
        let who = if basic.users.load().is_some() { "known" } else { "nobody" };
        tell(true, format!("basic {:?} {} {who}", basic.realm, basic.secret.name));
    }
    if let Some(external) = &policy.external {
        tell(true, asks(external));
    }
    tell(policy.is_shut, "shut".to_owned());
    tell(policy.one_is_enough, "one is enough".to_owned());
    if let Some(clients) = &policy.clients {
        let ClientAuth { wanted, roots } = &*clients.0;
        let who = if wanted.is_broken || roots.is_none() { "nobody" } else { "known" };
        let subject = wanted.subject.as_ref().map(|subject| format!(" {subject}")).unwrap_or_default();
        let page = wanted.error_page.as_ref().map(|page| format!(" else {page}")).unwrap_or_default();
        let passes = if wanted.passes_certificate { " passed" } else { "" };
        tell(true, format!("clients {:?} {} {who}{subject}{page}{passes}", wanted.asks, wanted.depth));
    }
    if let Some(pages) = &policy.pages {
        let statuses: Vec<u16> = (400..600).filter(|status| pages.statuses.contains(*status)).collect();
        tell(true, format!("pages {} {statuses:?}", pages.upstream.key));
    }
    if let Some(headers) = &policy.answer_headers {
        tell(true, if headers.0.load().is_some() { "sets headers" } else { "knows no headers" }.to_owned());
    }
    tell(policy.slow_start.is_some(), format!("slow start {:?}", policy.slow_start.unwrap_or_default()));
    tell(policy.retry.budget != usual.retry.budget, format!("budget {:?}", policy.retry.budget));
    tell(policy.announces.is_some(), format!("PROXY {:?}", policy.announces));
    tell(policy.traces.is_some(), format!("traces {:?}", policy.traces));
    tell(!policy.trusts_trace, "of its own".to_owned());
    if let Some(rate) = &policy.rate {
        tell(true, format!("{} a second after {}", rate.bytes, rate.after));
    }
    let (retry, usual) = (&policy.retry, &usual.retry);
    tell(retry.tries != usual.tries, format!("tries {}", retry.tries));
    tell(retry.within != usual.within, format!("within {:?}", retry.within.unwrap_or_default()));
    let statuses: Vec<u16> = (400..600).filter(|status| retry.on_status.contains(*status)).collect();
    let when = [("error", retry.on_error), ("timeout", retry.on_timeout), ("any", retry.non_idempotent)];
    let when: Vec<&str> = when.iter().filter(|(_, is_set)| *is_set).map(|(name, _)| *name).collect();
    let is_other = (retry.on_error, retry.on_timeout, retry.non_idempotent, retry.on_status)
        != (usual.on_error, usual.on_timeout, usual.non_idempotent, usual.on_status);
    tell(is_other, format!("again on {when:?} {statuses:?}"));
    text
}

/// Whom a route asks, and what of the answer it takes.
fn asks(external: &External) -> String {
    let question = &external.question;
    let mut text = format!("asks {}", question.url);
    let mut tell = |word: &str, what: Option<String>| {
        if let Some(what) = what {
            text.push_str(&format!(" {word} {what}"));
        }
    };
    tell("of", external.place.upstream.as_ref().map(|upstream| upstream.key.to_string()));
    tell("by", question.method.as_ref().map(ToString::to_string));
    tell("signin", question.signin.as_ref().map(|signin| format!("{}#{}", signin.url, signin.argument)));
    tell("takes", (!question.passed.is_empty()).then(|| format!("{:?}", question.passed)));
    tell("redirect", question.redirect.as_ref().map(ToString::to_string));
    tell("cookie", question.always_sets_cookie.then(|| "always".to_owned()));
    tell("remembers", question.remembering.as_ref().map(|held| format!("{} {:?}", held.key, held.statuses)));
    let known = |slot: &Slot<SetHeaders>| if slot.load().is_some() { "known" } else { "nobody knows" }.to_owned();
    tell("headers", external.headers.as_ref().map(known));
    text
}

#[test]
fn every_case_goes_where_it_says() {
    let mut wrong = Vec::new();
    let mut count = 0;
    for (file, text) in FILES {
        let cases = parse(text);
        let (common, cases) = cases.split_first().expect("a case");
        for case in cases {
            let lines: Vec<&String> = common.objects.iter().chain(&case.objects).collect();
            let world = world(&lines);
            for (ask, wanted) in &case.asks {
                count += 1;
                let seen = world.answer(ask);
                if seen != *wanted {
                    wrong.push(format!("{file}: {}\n  {ask}\n    wanted {wanted}\n    seen   {seen}", case.title));
                }
            }
            let faults: Vec<(Key, ingress::Fault)> = world.compiler.faults().into_iter().collect();
            let seen: Vec<String> =
                faults.iter().map(|(key, f)| format!("{}/{} {}", key.namespace, key.name, f.reason)).collect();
            let mut missing: Vec<String> = case.faults.clone();
            for (at, line) in seen.iter().enumerate() {
                let whole = format!("{line}: {}", faults[at].1.message);
                match missing.iter().position(|wanted| wanted == line || whole == *wanted || whole.starts_with(wanted))
                {
                    Some(found) => drop(missing.remove(found)),
                    None => wrong.push(format!("{file}: {}\n  nobody expected {whole}", case.title)),
                }
            }
            wrong.extend(missing.iter().map(|fault| format!("{file}: {}\n  nobody said {fault}", case.title)));
        }
    }
    assert!(count > 50, "{count} questions were asked");
    assert!(wrong.is_empty(), "{} of {count} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// One route and ten thousand: the same route is found, and what is looked at does not grow.
#[test]
fn ten_thousand_routes_are_looked_up_like_one() {
    let service = "Service shop/web {ports: [{name: http, port: 80}]}".to_owned();
    let class = "IngressClass fairlead {controller: fairlead.io/ingress}".to_owned();
    let paths: Vec<String> = (0..10_000)
        .map(|n| {
            format!("{{path: /p{n}, pathType: Prefix, backend: {{service: {{name: web, port: {{number: 80}}}}}}}}")
        })
        .collect();
    let line = format!(
        "Ingress shop/web {{ingressClassName: fairlead, rules: [{{http: {{paths: [{}]}}}}]}}",
        paths.join(", ")
    );
    let world = world(&[&service, &class, &line]);
    assert_eq!(world.routes.routes().count(), 10_000);
    for n in [0, 17, 9_999] {
        let (method, headers) = (Method::GET, HeaderMap::new());
        let path = format!("/p{n}/and/more");
        let ask = Ask { host: "any.example", path: &path, query: "", method: &method, headers: &headers };
        assert_eq!(world.routes.find(&ask).map(|route| route.name.path.to_string()), Some(format!("/p{n}")));
    }
    assert_eq!(world.answer("GET http://any.example/p"), "404");
}

#[test]
fn a_change_is_one_of_its_own_host() {
    let lines = [
        "IngressClass fairlead {controller: fairlead.io/ingress}",
        "Service shop/web {ports: [{port: 80}]}",
        "Ingress shop/a {ingressClassName: fairlead, rules: [{host: a.example, http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: web, port: {number: 80}}}}]}}]}",
        "Ingress shop/b {ingressClassName: fairlead, rules: [{host: b.example, http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: web, port: {number: 80}}}}]}}]}",
    ]
    .map(str::to_owned);
    let mut world = world(&lines.iter().collect::<Vec<_>>());
    assert!(world.compiler.routes().is_none(), "nothing has changed since");
    world.compiler.remove_ingress(&Key::new("shop", "a"));
    world.routes = world.compiler.routes().expect("a change");
    assert_eq!(world.answer("GET http://a.example/"), "404");
    assert_eq!(world.answer("GET http://b.example/"), "shop/web:80 503");
    // A class that is another controller's takes its Ingresses along.
    world.compiler.remove_class("fairlead");
    let class = object("IngressClass fairlead {controller: elsewhere.example/ingress}");
    world.compiler.set_class(serde_json::from_value(class).expect("a class"));
    world.routes = world.compiler.routes().expect("a change");
    assert_eq!(world.answer("GET http://b.example/"), "404");
}
