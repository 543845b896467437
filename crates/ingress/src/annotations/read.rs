//! Reads each known annotation, once.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use api::object::Metadata;
use http::{HeaderName, HeaderValue, StatusCode};
use ipnet::IpNet;
use regex::Regex;
use rustls_pki_types::ServerName;

use super::{EndpointTls, NGINX, OURS, Settings, answers, clients, copies, external, ours};
use crate::cors::Cors;
use crate::limits::RateLimits;

use crate::policy::{BackendProtocol, Balance};
use crate::rewrites::{CookieChanges, Replacement};
use crate::route::{Canary, Filter, HeaderChanges, PathRewrite, ValueMatch};
use crate::sticky::Affinity;
use crate::translate::Fault;
use crate::variables::Template;

/// Keys and what each does to the settings. An error says what is wrong with the value.
type Reader = fn(&mut Draft, &str) -> Result<(), String>;

const READERS: &[(&str, Reader)] = &[
    ("use-regex", |draft, text| flag(text).map(|on| draft.settings.use_regex |= on)),
    ("rewrite-target", rewrite_target),
    ("ssl-redirect", |draft, text| flag(text).map(|on| draft.ssl_redirect = Some(on))),
    ("force-ssl-redirect", |draft, text| flag(text).map(|on| draft.force_ssl_redirect = on)),
    ("permanent-redirect", |draft, text| location(text).map(|to| draft.permanent = Some(to))),
    ("permanent-redirect-code", |draft, text| redirect_code(text).map(|code| draft.permanent_code = Some(code))),
    ("temporal-redirect", |draft, text| location(text).map(|to| draft.temporal = Some(to))),
    ("temporal-redirect-code", |draft, text| redirect_code(text).map(|code| draft.temporal_code = Some(code))),
    ("proxy-body-size", |draft, text| size(text).map(|bytes| draft.settings.policy.body_limit = bytes)),
    ("proxy-connect-timeout", |draft, text| seconds(text).map(|time| draft.settings.policy.connect_timeout = time)),
    ("proxy-read-timeout", |draft, text| seconds(text).map(|time| draft.settings.policy.read_timeout = time)),
    ("proxy-send-timeout", |draft, text| seconds(text).map(|time| draft.settings.policy.send_timeout = time)),
    ("proxy-next-upstream", next_upstream),
    ("proxy-next-upstream-tries", |draft, text| number(text).map(|tries| draft.settings.policy.retry.tries = tries)),
    ("proxy-next-upstream-timeout", |draft, text| {
        let within = seconds(text)?;
        draft.settings.policy.retry.within = (!within.is_zero()).then_some(within);
        Ok(())
    }),
    ("backend-protocol", backend_protocol),
    ("proxy-ssl-secret", |draft, text| {
        let name = own_name(text, &draft.namespace, "Secret").inspect_err(|_| draft.endpoints.is_broken = true)?;
        draft.endpoints.secret = Some(name);
        Ok(())
    }),
    ("proxy-ssl-verify", |draft, text| {
        draft.endpoints.verifies = switch(text).inspect_err(|_| draft.endpoints.is_broken = true)?;
        Ok(())
    }),
    ("proxy-ssl-verify-depth", |draft, text| match text.parse() {
        Ok(depth @ 1..=16) => {
            draft.endpoints.depth = depth;
            Ok(())
        }
        _ => Err("is no number of certificates between 1 and 16".to_owned()),
    }),
    ("proxy-ssl-name", |draft, text| {
        let name = ServerName::try_from(text.to_owned()).map_err(|_| "is no DNS name".to_owned())?;
        draft.endpoints.name = Some(name);
        Ok(())
    }),
    ("proxy-ssl-server-name", |draft, text| switch(text).map(|on| draft.endpoints.tells_name = on)),
    ("ssl-passthrough", |draft, text| flag(text).map(|on| draft.settings.passes_tls = on)),
    ("service-upstream", |draft, text| flag(text).map(|on| draft.settings.to_cluster_ip = on)),
    ("load-balance", load_balance),
    ("whitelist-source-range", |draft, text| ranges(text).map(|all| draft.settings.policy.allow.extend(all))),
    ("allowlist-source-range", |draft, text| ranges(text).map(|all| draft.settings.policy.allow.extend(all))),
    ("denylist-source-range", |draft, text| ranges(text).map(|all| draft.settings.policy.deny.extend(all))),
    ("upstream-vhost", |draft, text| {
        let host = HeaderValue::from_str(text).map_err(|_| "is no host name".to_owned())?;
        draft.settings.filters.push(Filter::RewriteHost(host));
        Ok(())
    }),
    ("proxy-redirect-from", |draft, text| match text {
        "default" => Err("is not supported: what it stands for is no part of a URL here; write the URL".to_owned()),
        text => {
            draft.redirect_from = (text != "off").then(|| text.into());
            Ok(())
        }
    }),
    ("proxy-redirect-to", |draft, text| header(text).map(|_| draft.redirect_to = Some(text.into()))),
    ("proxy-cookie-domain", |draft, text| replacement(text).map(|found| draft.cookies.domain = found)),
    ("proxy-cookie-path", |draft, text| replacement(text).map(|found| draft.cookies.path = found)),
    ("server-alias", server_alias),
    ("app-root", |draft, text| {
        let root = location(text)?;
        draft.settings.app_root = Some(root);
        Ok(())
    }),
    ("from-to-www-redirect", |draft, text| flag(text).map(|on| draft.settings.from_to_www = on)),
    ("x-forwarded-prefix", |draft, text| {
        let value = HeaderValue::from_str(text).map_err(|_| "cannot stand in a header".to_owned())?;
        let set = vec![(HeaderName::from_static("x-forwarded-prefix"), value)];
        draft.settings.filters.push(Filter::RequestHeaders(HeaderChanges { set, ..HeaderChanges::default() }));
        Ok(())
    }),
    // Answers and requests are passed on as they come.
    ("proxy-buffering", only_off),
    ("proxy-request-buffering", only_off),
    ("enable-cors", |draft, text| flag(text).map(|on| draft.has_cors = on)),
    ("cors-allow-origin", |draft, text| {
        draft.cors.origins = text.split(',').map(|origin| origin.trim().into()).collect();
        Ok(())
    }),
    ("cors-allow-methods", |draft, text| header(text).map(|value| draft.cors.methods = value)),
    ("cors-allow-headers", |draft, text| header(text).map(|value| draft.cors.headers = value)),
    ("cors-expose-headers", |draft, text| header(text).map(|value| draft.cors.expose = Some(value))),
    ("cors-allow-credentials", |draft, text| flag(text).map(|on| draft.cors.credentials = on)),
    ("cors-max-age", |draft, text| seconds(text).map(|age| draft.cors.max_age = age)),
    ("affinity", |draft, text| match text {
        "cookie" => {
            draft.has_affinity = true;
            Ok(())
        }
        _ => Err("is not supported; write cookie".to_owned()),
    }),
    // A client stays with its endpoint for as long as that is there, in both.
    ("affinity-mode", |_, text| match text {
        "balanced" | "persistent" => Ok(()),
        _ => Err("is neither balanced nor persistent".to_owned()),
    }),
    ("session-cookie-name", |draft, text| cookie_part(text).map(|name| draft.affinity.cookie = name)),
    ("session-cookie-path", |draft, text| cookie_part(text).map(|path| draft.affinity.path = path)),
    ("session-cookie-domain", |draft, text| cookie_part(text).map(|domain| draft.affinity.domain = Some(domain))),
    ("session-cookie-max-age", |draft, text| seconds(text).map(|age| draft.affinity.max_age = Some(age))),
    ("session-cookie-samesite", |draft, text| match text {
        "None" | "Lax" | "Strict" => {
            draft.affinity.same_site = Some(text.into());
            Ok(())
        }
        _ => Err("is neither None, Lax nor Strict".to_owned()),
    }),
    ("session-cookie-secure", |draft, text| flag(text).map(|on| draft.affinity.secure = Some(on))),
    ("upstream-hash-by", |draft, text| {
        let by = Template::parse(text)?;
        if by.constant().is_some() {
            return Err(
                "is the same for all requests; write variables, such as $remote_addr or $http_x_user".to_owned()
            );
        }
        draft.settings.policy.hash_by = Some(by);
        Ok(())
    }),
    ("satisfy", |draft, text| match text {
        "any" | "all" => {
            draft.settings.policy.one_is_enough = text == "any";
            Ok(())
        }
        _ => Err("is neither any nor all".to_owned()),
    }),
    ("limit-rps", |draft, text| number(text).map(|rate| draft.limits.per_second = rate)),
    ("limit-rpm", |draft, text| number(text).map(|rate| draft.limits.per_minute = rate)),
    ("limit-connections", |draft, text| number(text).map(|count| draft.limits.at_once = count)),
    ("limit-burst-multiplier", |draft, text| number(text).map(|burst| draft.limits.burst = burst)),
    ("limit-whitelist", |draft, text| ranges(text).map(|all| draft.limits.exempt = all)),
    ("auth-type", |draft, text| match text {
        "basic" => {
            draft.has_basic = true;
            Ok(())
        }
        _ => Err("is not supported; write basic".to_owned()),
    }),
    ("auth-secret", |draft, text| {
        own_name(text, &draft.namespace, "Secret").map(|name| draft.auth_secret = Some(name))
    }),
    // What there is in the Secret says it.
    ("auth-secret-type", |_, text| match text {
        "auth-file" | "auth-map" => Ok(()),
        _ => Err("is neither auth-file nor auth-map".to_owned()),
    }),
    ("auth-realm", |draft, text| match header(text) {
        Ok(_) if !text.contains(['"', '\\']) => {
            draft.realm = text.into();
            Ok(())
        }
        _ => Err("cannot stand in quotation marks in a header".to_owned()),
    }),
    ("canary", |draft, text| flag(text).map(|on| draft.is_canary = on)),
    ("canary-weight", |draft, text| number(text).map(|weight| draft.canary.weight = weight)),
    ("canary-weight-total", |draft, text| number(text).map(|total| draft.canary.total = total.max(1))),
    ("canary-by-header", |draft, text| {
        let name = HeaderName::from_bytes(text.as_bytes()).map_err(|_| "is no name of a header".to_owned())?;
        draft.canary_header = Some(name);
        Ok(())
    }),
    ("canary-by-header-value", |draft, text| {
        draft.canary_value = Some(ValueMatch::Exact(text.into()));
        Ok(())
    }),
    ("canary-by-header-pattern", |draft, text| {
        let regex = Regex::new(text).map_err(|_| "is no regular expression".to_owned())?;
        draft.canary_pattern = Some(ValueMatch::Pattern(regex));
        Ok(())
    }),
    ("canary-by-cookie", |draft, text| {
        draft.canary.cookie = Some(text.into());
        Ok(())
    }),
];

/// Settings before keys that belong together are put together.
#[derive(Default)]
pub struct Draft {
    /// The Ingress's.
    namespace: String,
    pub settings: Settings,
    external: external::Draft,
    answers: answers::Draft,
    clients: clients::Draft,
    copies: copies::Draft,
    ssl_redirect: Option<bool>,
    force_ssl_redirect: bool,
    permanent: Option<Box<str>>,
    permanent_code: Option<StatusCode>,
    temporal: Option<Box<str>>,
    temporal_code: Option<StatusCode>,
    has_cors: bool,
    cors: Cors,
    redirect_from: Option<Box<str>>,
    redirect_to: Option<Box<str>>,
    cookies: CookieChanges,
    is_tls: bool,
    endpoints: EndpointTls,
    has_basic: bool,
    auth_secret: Option<Box<str>>,
    realm: Box<str>,
    has_affinity: bool,
    affinity: Affinity,
    limits: RateLimits,
    is_canary: bool,
    canary: Canary,
    canary_header: Option<HeaderName>,
    canary_value: Option<ValueMatch>,
    canary_pattern: Option<ValueMatch>,
}

pub fn read(metadata: &Metadata, faults: &mut BTreeSet<Fault>) -> Settings {
    let mut draft = Draft { namespace: metadata.namespace.clone(), ..Draft::default() };
    draft.canary.total = 100;
    draft.limits.burst = 5;
    for (key, value) in &metadata.annotations {
        let Some(short) = key.strip_prefix(NGINX).or_else(|| key.strip_prefix(OURS)) else { continue };
        let value = value.trim();
        let read = match READERS.iter().find(|(known, _)| *known == short) {
            Some((_, reader)) => Some(reader(&mut draft, value)),
            None => {
                let door = draft.external.read(short, &draft.namespace, value);
                let door = door.or_else(|| draft.answers.read(short, &draft.namespace, value));
                let door = door.or_else(|| draft.clients.read(short, &draft.namespace, value));
                let door = door.or_else(|| draft.copies.read(short, value));
                door.or_else(|| ours::read(&mut draft.settings.policy, short, value))
            }
        };
        let Some(read) = read else {
            let message = format!("annotation {key} is not supported; it changes nothing");
            faults.insert(Fault { reason: "AnnotationNotSupported", message });
            continue;
        };
        if let Err(problem) = read {
            let message = format!("annotation {key} is {value:?}, which {problem}; it changes nothing");
            faults.insert(Fault { reason: "AnnotationNotValid", message });
        }
    }
    if draft.has_basic != draft.auth_secret.is_some() {
        let message = "annotation auth-type basic and annotation auth-secret stand together; requests are refused until both are there";
        faults.insert(Fault { reason: "AnnotationNotValid", message: message.to_owned() });
    }
    if draft.answers.lacks_backend() {
        let message = "annotation custom-http-errors without default-backend changes nothing; name the Service that has the pages";
        faults.insert(Fault { reason: "AnnotationNotValid", message: message.to_owned() });
    }
    if draft.copies.lacks_target() {
        let message = "annotations mirror-… without mirror-target change nothing; say where copies go";
        faults.insert(Fault { reason: "AnnotationNotValid", message: message.to_owned() });
    }
    if draft.external.lacks_url() {
        let message = "annotations auth-… without auth-url change nothing; nobody would be asked";
        faults.insert(Fault { reason: "AnnotationNotValid", message: message.to_owned() });
    }
    finish(draft)
}

fn finish(draft: Draft) -> Settings {
    let mut settings = draft.settings;
    settings.https_only = match (draft.force_ssl_redirect, draft.ssl_redirect) {
        (true, _) => Some(true),
        (false, Some(false)) => Some(false),
        // Without a certificate there is nothing to be sent to.
        (false, Some(true) | None) => None,
    };
    if draft.has_cors {
        settings.filters.push(Filter::Cors(Arc::new(draft.cors)));
    }
    if let (Some(from), Some(to)) = (draft.redirect_from, draft.redirect_to) {
        settings.filters.push(Filter::Redirects(Replacement { from, to }));
    }
    if draft.cookies != CookieChanges::default() {
        settings.filters.push(Filter::Cookies(draft.cookies));
    }
    if draft.is_tls {
        settings.backend_tls = Some(draft.endpoints);
    }
    // One of the two without the other lets nobody in: whoever wrote it wanted a door.
    if draft.has_basic || draft.auth_secret.is_some() {
        settings.basic = Some((draft.auth_secret.unwrap_or_default(), draft.realm));
    }
    settings.door = draft.external.finish();
    settings.answers = draft.answers.finish();
    settings.clients = draft.clients.finish();
    settings.mirror = draft.copies.finish();
    if draft.has_affinity {
        settings.policy.affinity = Some(Arc::new(draft.affinity));
    }
    if draft.limits.per_second > 0 || draft.limits.per_minute > 0 || draft.limits.at_once > 0 {
        settings.policy.limits = Some(Arc::new(draft.limits));
    }
    let permanent = draft.permanent.map(|to| (draft.permanent_code.unwrap_or(StatusCode::MOVED_PERMANENTLY), to));
    let temporal = draft.temporal.map(|to| (draft.temporal_code.unwrap_or(StatusCode::FOUND), to));
    // Of both the temporal one counts.
    settings.redirect = temporal.or(permanent);
    if draft.is_canary {
        let wanted = draft.canary_value.or(draft.canary_pattern).unwrap_or(ValueMatch::Present);
        let header = draft.canary_header.map(|name| (name, wanted));
        settings.canary = Some(Canary { header, ..draft.canary });
    }
    settings
}

pub fn header(text: &str) -> Result<HeaderValue, String> {
    HeaderValue::from_str(text).map_err(|_| "cannot stand in a header".to_owned())
}

fn cookie_part(text: &str) -> Result<Box<str>, String> {
    let plain = |c: char| c.is_ascii_graphic() && !matches!(c, ';' | ',' | '"' | '\\');
    match !text.is_empty() && text.chars().all(plain) {
        true => Ok(text.into()),
        false => Err("cannot stand in a cookie".to_owned()),
    }
}

/// `off`, or a text and what stands in its place.
fn replacement(text: &str) -> Result<Option<Replacement>, String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    match words[..] {
        ["off"] => Ok(None),
        [from, _] if from.starts_with('~') => Err("is a pattern, which is not supported; write plain texts".to_owned()),
        [from, to] if HeaderValue::from_str(to).is_ok() && !to.contains(';') => {
            Ok(Some(Replacement { from: from.into(), to: to.into() }))
        }
        _ => Err("is neither off nor two words: what stands there, and what is to stand there".to_owned()),
    }
}

fn only_off(_: &mut Draft, text: &str) -> Result<(), String> {
    match text {
        "off" => Ok(()),
        _ => Err("is not supported: bodies are passed on as they come; write off".to_owned()),
    }
}

/// The name of an object of the Ingress's own namespace, which may stand in front.
pub fn own_name(text: &str, namespace: &str, kind: &str) -> Result<Box<str>, String> {
    let name = match text.split_once('/') {
        Some((of, name)) if of == namespace => name,
        Some(_) => return Err(format!("is of another namespace; write a {kind} of the Ingress's own")),
        None => text,
    };
    match api::names::dns_subdomain(name).is_empty() {
        true => Ok(name.into()),
        false => Err(format!("is no {kind}'s name; write one of the Ingress's own namespace")),
    }
}

fn server_alias(draft: &mut Draft, text: &str) -> Result<(), String> {
    for alias in text.split(',').map(str::trim).filter(|alias| !alias.is_empty()) {
        if alias.starts_with('~') {
            return Err(format!("holds the pattern {alias:?}; write hosts, or *.example.com"));
        }
        draft.settings.aliases.push(alias.to_owned());
    }
    Ok(())
}

pub fn flag(text: &str) -> Result<bool, String> {
    match text {
        "true" | "True" | "TRUE" | "1" | "t" | "T" => Ok(true),
        "false" | "False" | "FALSE" | "0" | "f" | "F" => Ok(false),
        _ => Err("is neither true nor false".to_owned()),
    }
}

/// As nginx writes a flag.
pub fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("is neither on nor off".to_owned()),
    }
}

pub fn number(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| "is no number".to_owned())
}

/// Seconds, as nginx has them in annotations; `s`, `ms` and `m` may follow.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let count: u64 = digits.parse().map_err(|_| "is no time; write seconds".to_owned())?;
    match unit {
        "" | "s" => Ok(Duration::from_secs(count)),
        "ms" => Ok(Duration::from_millis(count)),
        "m" => Ok(Duration::from_secs(count.saturating_mul(60))),
        _ => Err("is no time; write seconds".to_owned()),
    }
}

/// Bytes, or with `k`, `m` or `g` behind; 0 means any.
fn size(text: &str) -> Result<u64, String> {
    let wrong = || "is no size; write 8m, 512k or 0 for any".to_owned();
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let count: u64 = digits.parse().map_err(|_| wrong())?;
    let factor = match unit {
        "" => 1,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        _ => return Err(wrong()),
    };
    count.checked_mul(factor).ok_or_else(wrong)
}

fn ranges(text: &str) -> Result<Vec<IpNet>, String> {
    let parse = |one: &str| -> Result<IpNet, String> {
        one.parse::<IpNet>()
            .or_else(|_| one.parse::<std::net::IpAddr>().map(IpNet::from))
            .map_err(|_| format!("holds {one:?}; write ranges as 192.0.2.0/24, by comma"))
    };
    text.split(',').map(str::trim).filter(|one| !one.is_empty()).map(parse).collect()
}

pub fn location(text: &str) -> Result<Box<str>, String> {
    match HeaderValue::from_str(text) {
        Ok(_) if text.starts_with("http://") || text.starts_with("https://") || text.starts_with('/') => {
            Ok(text.into())
        }
        _ => Err("is no URL; write https://host/path".to_owned()),
    }
}

fn redirect_code(text: &str) -> Result<StatusCode, String> {
    let code = text.parse::<u16>().ok().filter(|code| (300..=308).contains(code));
    code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or_else(|| "is no redirect; write 301 to 308".to_owned())
}

fn rewrite_target(draft: &mut Draft, text: &str) -> Result<(), String> {
    if !text.starts_with('/') && !text.starts_with('$') {
        return Err("does not begin with /".to_owned());
    }
    // Its groups are those of the path.
    draft.settings.use_regex = true;
    draft.settings.filters.push(Filter::RewritePath(PathRewrite::Groups(text.into())));
    Ok(())
}

fn next_upstream(draft: &mut Draft, text: &str) -> Result<(), String> {
    let mut retry = draft.settings.policy.retry;
    (retry.on_error, retry.on_timeout) = (false, false);
    for word in text.split_whitespace() {
        match word {
            "error" => retry.on_error = true,
            "timeout" => retry.on_timeout = true,
            "non_idempotent" => retry.non_idempotent = true,
            "off" => (retry.on_error, retry.on_timeout) = (false, false),
            // An answer that is no HTTP is an error here.
            "invalid_header" => retry.on_error = true,
            _ => match word.strip_prefix("http_").and_then(|code| code.parse::<u16>().ok()) {
                Some(code @ (403 | 404 | 429 | 500 | 502 | 503 | 504)) => retry.on_status.insert(code),
                _ => return Err(format!("holds {word:?}, which nginx does not know")),
            },
        }
    }
    draft.settings.policy.retry = retry;
    Ok(())
}

fn backend_protocol(draft: &mut Draft, text: &str) -> Result<(), String> {
    draft.settings.policy.protocol = match text.to_ascii_uppercase().as_str() {
        "HTTP" | "AUTO_HTTP" => BackendProtocol::Http1,
        "GRPC" | "H2C" => BackendProtocol::H2c,
        "HTTPS" => {
            draft.is_tls = true;
            BackendProtocol::Http1
        }
        "GRPCS" => {
            draft.is_tls = true;
            BackendProtocol::H2c
        }
        _ => return Err("is not supported; write HTTP, HTTPS, GRPC or GRPCS".to_owned()),
    };
    Ok(())
}

fn load_balance(draft: &mut Draft, text: &str) -> Result<(), String> {
    draft.settings.policy.balance = match text {
        "round_robin" => Balance::RoundRobin,
        // Both mean: where less is going on.
        "ewma" | "least_load" => Balance::LeastLoad,
        _ => return Err("is neither round_robin nor ewma".to_owned()),
    };
    Ok(())
}
