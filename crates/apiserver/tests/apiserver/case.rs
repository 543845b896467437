//! Case files: requests and what they answer.
//!
//! ```text
//! # What is shown, and why it matters.
//! = service-cidrs 10.96.0.0/12,fd00:10:96::/112
//! -> POST /api/v1/namespaces/default/configmaps
//! | as: alice developers
//! {"apiVersion": "v1", …}
//! <- 201
//! | warning: ~unknown field
//! {"metadata": {"uid": "$uid"}}
//! ```
//!
//! Each case has a cluster of its own. `=` lines (`service-cidrs`, `node-ports`) set it up. `|` lines are headers; of an
//! answer they are patterns, `-` says that there is none. `as` is the caller: a name and groups; `-` leaves it to the
//! credentials in the headers; without it an administrator asks. A method may also be MERGE, STRATEGIC, JSONPATCH or
//! APPLY: a PATCH of that kind. The body follows as it is sent; or `base64` and its code, or `spaces` and how many. An
//! answer's code may be `4xx` or `!2xx`; its body is a pattern (see `pattern.rs`), or plain text, where `~` in front
//! asks for a part. `${name}` stands for what a pattern took as `$name`.

use crate::cluster::{Answer, Cluster, Options};
use crate::pattern::{Names, fill, mismatch};
use apiserver::Identity;
use base64::Engine;
use bytes::Bytes;
use serde_json::Value;

#[derive(Default)]
struct Case {
    title: String,
    settings: Vec<String>,
    steps: Vec<Step>,
}

#[derive(Default)]
struct Step {
    line: usize,
    method: String,
    path: String,
    headers: Vec<(String, String)>,
    body: String,
    code: String,
    wanted_headers: Vec<(String, String)>,
    pattern: String,
}

fn parse(text: &str) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let mut answering = false;
    for (i, line) in text.lines().enumerate() {
        if let Some(title) = line.strip_prefix("# ") {
            cases.push(Case { title: title.to_string(), ..Case::default() });
            continue;
        }
        let Some(case) = cases.last_mut() else {
            assert!(line.trim().is_empty(), "line {}: a case begins with a title", i + 1);
            continue;
        };
        if let Some(setting) = line.strip_prefix("= ") {
            case.settings.push(setting.to_string());
        } else if let Some(request) = line.strip_prefix("-> ") {
            let (method, path) = request.split_once(' ').expect("a request is a method and a path");
            let step = Step { line: i + 1, method: method.into(), path: path.trim().into(), ..Step::default() };
            case.steps.push(step);
            answering = false;
        } else if let Some(step) = case.steps.last_mut() {
            if let Some(code) = line.strip_prefix("<- ") {
                step.code = code.trim().to_string();
                answering = true;
            } else if let Some(header) = line.strip_prefix("| ") {
                let (name, value) = header.split_once(": ").expect("a header is a name and a value");
                let list = if answering { &mut step.wanted_headers } else { &mut step.headers };
                list.push((name.into(), value.into()));
            } else {
                let text = if answering { &mut step.pattern } else { &mut step.body };
                text.push_str(line);
                text.push('\n');
            }
        } else {
            assert!(line.trim().is_empty(), "line {}: a request begins with an arrow", i + 1);
        }
    }
    cases
}

/// Runs every case of a file and reports all that fail, not only the first.
pub async fn run(file: &str, text: &str) {
    let cases = parse(text);
    assert!(!cases.is_empty(), "{file} holds cases");
    let mut failures = Vec::new();
    for case in &cases {
        if let Err(problem) = play(case).await {
            failures.push(format!("{file}: {}\n  {problem}\n", case.title));
        }
    }
    assert!(failures.is_empty(), "{} of {} cases failed\n\n{}", failures.len(), cases.len(), failures.join("\n"));
}

/// Runs cases that are known to fail, and reports those that pass: they are fixed and belong to their topic's file.
pub async fn run_gaps(file: &str, text: &str) {
    let mut passed = Vec::new();
    for case in parse(text) {
        if play(&case).await.is_ok() {
            passed.push(case.title);
        }
    }
    assert!(passed.is_empty(), "{file}: these pass now; move them to their topic's file: {passed:#?}");
}

async fn play(case: &Case) -> Result<(), String> {
    let cluster = Cluster::new(options(&case.settings)?).await;
    let mut names = Names::new();
    if case.steps.is_empty() {
        return Err("the case asks nothing".into());
    }
    for step in &case.steps {
        let answer = ask(&cluster, step, &names).await.map_err(|e| format!("line {}: {e}", step.line))?;
        judge(step, &answer, &mut names).map_err(|problem| {
            let body = String::from_utf8_lossy(&answer.body);
            let shown: String = body.chars().take(1500).collect();
            format!("line {}: {} {}: {problem}\n  answer {} {shown}", step.line, step.method, step.path, answer.code)
        })?;
    }
    Ok(())
}

fn options(settings: &[String]) -> Result<Options, String> {
    let mut options = Options::default();
    for setting in settings {
        match setting.split_once(' ') {
            Some(("service-cidrs", list)) => options.service_cidrs = list.split(',').map(str::to_string).collect(),
            Some(("node-ports", range)) => {
                let (low, high) = range.split_once('-').ok_or("node-ports wants LOW-HIGH")?;
                let port = |text: &str| text.parse::<u16>().map_err(|e| e.to_string());
                options.node_ports = port(low)?..=port(high)?;
            }
            _ => return Err(format!("unknown setting {setting:?}")),
        }
    }
    Ok(options)
}

async fn ask(cluster: &Cluster, step: &Step, names: &Names) -> Result<Answer, String> {
    let mut client = cluster.admin();
    let mut headers: Vec<(String, String)> = Vec::new();
    for (name, value) in &step.headers {
        let value = fill(value, names)?;
        if name != "as" {
            headers.push((name.to_lowercase(), value));
        } else if value == "-" {
            client = cluster.stranger();
        } else {
            let (user, groups) = value.split_once(' ').unwrap_or((&value, ""));
            let groups: Vec<&str> = groups.split(',').filter(|g| !g.is_empty()).collect();
            client = cluster.client(Identity::user(user, &groups));
        }
    }
    let (method, media) = match step.method.as_str() {
        "MERGE" => ("PATCH", "application/merge-patch+json"),
        "STRATEGIC" => ("PATCH", "application/strategic-merge-patch+json"),
        "JSONPATCH" => ("PATCH", "application/json-patch+json"),
        "APPLY" => ("PATCH", "application/apply-patch+yaml"),
        method => (method, "application/json"),
    };
    let body = body(&fill(&step.body, names)?)?;
    if !body.is_empty() && !headers.iter().any(|(name, _)| name == "content-type") {
        headers.push(("content-type".into(), media.into()));
    }
    let headers: Vec<(&str, &str)> = headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    Ok(client.request(method, &fill(&step.path, names)?, &headers, body).await)
}

fn body(text: &str) -> Result<Bytes, String> {
    let text = text.trim();
    if let Some(code) = text.strip_prefix("base64 ") {
        let code: String = code.split_whitespace().collect();
        let bytes = base64::engine::general_purpose::STANDARD.decode(code).map_err(|e| e.to_string())?;
        return Ok(bytes.into());
    }
    if let Some(count) = text.strip_prefix("spaces ") {
        return Ok(vec![b' '; count.parse().map_err(|_| "spaces wants a number")?].into());
    }
    Ok(text.to_string().into())
}

fn judge(step: &Step, answer: &Answer, names: &mut Names) -> Result<(), String> {
    if !code_matches(&step.code, answer.code) {
        return Err(format!("wanted {}", step.code));
    }
    for (name, wanted) in &step.wanted_headers {
        let found: Vec<&str> = answer.headers.get_all(name.as_str()).iter().filter_map(|v| v.to_str().ok()).collect();
        let good = match wanted.strip_prefix('~') {
            _ if wanted == "-" => found.is_empty(),
            _ if wanted == "*" => !found.is_empty(),
            _ if wanted.starts_with('$') => match found.first() {
                Some(value) => {
                    names.insert(wanted[1..].to_string(), Value::String((*value).to_string()));
                    true
                }
                None => false,
            },
            Some(part) => found.iter().any(|v| v.contains(part)),
            None => found.iter().any(|v| v == wanted),
        };
        if !good {
            return Err(format!("header {name}: wanted {wanted:?}, found {found:?}"));
        }
    }
    let pattern = fill(step.pattern.trim(), names)?;
    if pattern.is_empty() {
        return Ok(());
    }
    if pattern.starts_with(['{', '[']) {
        let pattern: Value = serde_json::from_str(&pattern).map_err(|e| format!("the pattern is not JSON: {e}"))?;
        let found: Value = serde_json::from_slice(&answer.body).map_err(|e| format!("the answer is not JSON: {e}"))?;
        return mismatch("", &pattern, Some(&found), names).map_or(Ok(()), Err);
    }
    let found = String::from_utf8_lossy(&answer.body);
    let good = match pattern.strip_prefix('~') {
        Some(part) => found.contains(part),
        None => found.trim() == pattern,
    };
    if good { Ok(()) } else { Err(format!("wanted the text {pattern:?}")) }
}

fn code_matches(wanted: &str, code: u16) -> bool {
    match (wanted.strip_prefix('!'), wanted.strip_suffix("xx")) {
        (Some(not), _) => !code_matches(not, code),
        (None, Some(class)) => code.to_string().starts_with(class),
        (None, None) => code.to_string() == wanted,
    }
}
