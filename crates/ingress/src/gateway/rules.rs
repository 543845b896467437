//! What the rules of a route say, whatever it attaches to.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use api::object::Key;
use http::{HeaderName, HeaderValue, Method, StatusCode};
use regex::{Regex, RegexBuilder};

use super::RouteType;
use super::backends::Lookup;
use super::condition::Problem;
use super::objects::{
    AnyRoute, CorsFilter, GrpcMethod, HeaderModifier, MethodMatch, PathModifier, RouteFilter, RouteMatch, RouteRule,
};
use super::ports::StreamRoute;
use crate::cors::Cors;
use crate::policy::{BackendProtocol, Policy};
use crate::route::{
    Action, Filter, HeaderChanges, Matches, Mirror, MirrorTo, PathMatch, PathRewrite, Redirect, Route, RouteName,
    ValueMatch,
};

/// A route, translated.
#[derive(Clone, Debug)]
pub struct Translated {
    /// Of HTTP, in the order of rules and matches.
    pub routes: Vec<Arc<Route>>,
    /// Of everything else.
    pub stream: Option<Arc<StreamRoute>>,
    /// Why nothing of it counts.
    pub not_accepted: Option<Problem>,
    /// Rules that do not count, while others do.
    pub partly: Option<Problem>,
    pub unresolved: Vec<Problem>,
    /// Services that it asked for.
    pub asked: BTreeSet<Key>,
}

/// Bytes that one compiled pattern may take.
const PATTERN_LIMIT: usize = 1 << 20;

/// Translates a route. A rule that asks for what there is not answers 500.
pub fn translate(route: &AnyRoute, lookup: &mut Lookup<'_>) -> Translated {
    let (mut routes, mut wrong) = (Vec::new(), Vec::new());
    let mut stream = None;
    for (at, rule) in route.spec.rules.iter().enumerate() {
        let place = format!("spec.rules[{at}]");
        match lookup.kind {
            RouteType::Http | RouteType::Grpc => {
                let mut writer = Writer { route, rule, lookup, place: &place };
                match writer.rule() {
                    Ok(made) => routes.extend(made),
                    Err(problem) => {
                        routes.extend(writer.refused());
                        wrong.push(problem);
                    }
                }
            }
            // Only the first rule of these counts, as the API allows only one.
            RouteType::Tls | RouteType::Tcp | RouteType::Udp => {
                if stream.is_none() {
                    let filters = rule.backend_refs.iter().map(|_| (Vec::new(), None)).collect();
                    let backends = lookup.backends(&rule.backend_refs, filters);
                    let name = name_of(route, lookup.kind, "");
                    let counts = lookup.register.counts(&name);
                    stream = Some(Arc::new(StreamRoute { name, backends, counts }));
                }
            }
        }
    }
    let is_all = !wrong.is_empty() && wrong.len() == route.spec.rules.len();
    let first = wrong.into_iter().next();
    let (not_accepted, partly) = if is_all { (first, None) } else { (None, first) };
    Translated {
        routes,
        stream,
        not_accepted,
        partly,
        unresolved: std::mem::take(&mut lookup.problems),
        asked: std::mem::take(&mut lookup.asked),
    }
}

fn name_of(route: &AnyRoute, kind: RouteType, path: &str) -> RouteName {
    RouteName {
        kind: kind.kind(),
        namespace: route.metadata.namespace.as_str().into(),
        name: route.metadata.name.as_str().into(),
        host: route.spec.hostnames.join(",").into(),
        path: path.into(),
    }
}

struct Writer<'a, 'b> {
    route: &'a AnyRoute,
    rule: &'a RouteRule,
    lookup: &'a mut Lookup<'b>,
    place: &'a str,
}

fn unsupported(message: String) -> Problem {
    Problem::new("UnsupportedValue", message)
}

impl Writer<'_, '_> {
    fn rule(&mut self) -> Result<Vec<Arc<Route>>, Problem> {
        let place = self.place;
        let matches = self.matches()?;
        let mut redirect = None;
        let filters = self.filters(&self.rule.filters, place, &mut redirect, &matches)?;
        let mut of_backends = Vec::new();
        for (at, backend) in self.rule.backend_refs.iter().enumerate() {
            let place = format!("{place}.backendRefs[{at}]");
            let mut redirect = None;
            let filters = self.filters(&backend.filters, &place, &mut redirect, &matches)?;
            of_backends.push((filters, redirect));
        }
        let policy = Arc::new(self.policy()?);
        let action = match redirect {
            Some(redirect) => Action::Redirect(redirect),
            None => {
                let backends = self.lookup.backends(&self.rule.backend_refs, of_backends);
                match backends.list().iter().all(|one| one.weight == 0) {
                    // Nobody is to get any of it, or there is nobody.
                    true => Action::Respond(StatusCode::INTERNAL_SERVER_ERROR),
                    false => Action::Forward(backends),
                }
            }
        };
        Ok(self.finish(matches, &action, &filters, &policy))
    }

    /// The same requests, with nothing behind them.
    fn refused(&mut self) -> Vec<Arc<Route>> {
        let Ok(matches) = self.matches() else { return Vec::new() };
        self.finish(matches, &Action::Respond(StatusCode::INTERNAL_SERVER_ERROR), &[], &Policy::shared())
    }

    fn finish(
        &mut self,
        matches: Vec<(String, PathMatch, Matches)>,
        action: &Action,
        filters: &[Filter],
        policy: &Arc<Policy>,
    ) -> Vec<Arc<Route>> {
        let made = matches.into_iter().map(|(text, path, matches)| {
            let name = name_of(self.route, self.lookup.kind, &text);
            Arc::new(Route {
                counts: self.lookup.register.counts(&name),
                name,
                path,
                matches,
                action: action.clone(),
                filters: filters.to_vec(),
                policy: policy.clone(),
                canary: None,
            })
        });
        made.collect()
    }

    fn matches(&self) -> Result<Vec<(String, PathMatch, Matches)>, Problem> {
        let everything = [RouteMatch::default()];
        let wanted = if self.rule.matches.is_empty() { &everything[..] } else { &self.rule.matches };
        wanted
            .iter()
            .enumerate()
            .map(|(at, one)| self.one_match(one, &format!("{}.matches[{at}]", self.place)))
            .collect()
    }

    fn one_match(&self, wanted: &RouteMatch, place: &str) -> Result<(String, PathMatch, Matches), Problem> {
        let mut matches = Matches::default();
        for (at, header) in wanted.headers.iter().enumerate() {
            let place = format!("{place}.headers[{at}]");
            let name = HeaderName::from_bytes(header.name.as_bytes())
                .map_err(|_| unsupported(format!("{place}.name {:?} is no header's name", header.name)))?;
            // Of names that are equal the first counts.
            if !matches.headers.iter().any(|(held, _)| *held == name) {
                matches.headers.push((name, value_match(header.r#type.as_deref(), header.value.as_deref(), &place)?));
            }
        }
        for (at, argument) in wanted.query_params.iter().enumerate() {
            let place = format!("{place}.queryParams[{at}]");
            if !matches.query.iter().any(|(held, _)| **held == *argument.name) {
                let value = value_match(argument.r#type.as_deref(), argument.value.as_deref(), &place)?;
                matches.query.push((argument.name.as_str().into(), value));
            }
        }
        let (text, path) = match &wanted.method {
            Some(MethodMatch::Grpc(method)) => grpc_path(method, place)?,
            Some(MethodMatch::Http(method)) => {
                let method = Method::from_bytes(method.as_bytes())
                    .map_err(|_| unsupported(format!("{place}.method {method:?} is no method")))?;
                matches.method = Some(method);
                http_path(wanted, place)?
            }
            None => http_path(wanted, place)?,
        };
        Ok((text, path, matches))
    }

    fn filters(
        &mut self,
        wanted: &[RouteFilter],
        place: &str,
        redirect: &mut Option<Redirect>,
        matches: &[(String, PathMatch, Matches)],
    ) -> Result<Vec<Filter>, Problem> {
        let mut filters = Vec::new();
        let rewrites = |one: &RouteFilter| one.r#type == "URLRewrite";
        if wanted.iter().any(|one| one.r#type == "RequestRedirect") && wanted.iter().any(rewrites) {
            let message = format!("{place}.filters has both RequestRedirect and URLRewrite; keep one");
            return Err(Problem::new("IncompatibleFilters", message));
        }
        for (at, filter) in wanted.iter().enumerate() {
            let place = format!("{place}.filters[{at}]");
            let missing = |field: &str| unsupported(format!("{place}.{field} is missing"));
            match filter.r#type.as_str() {
                "RequestHeaderModifier" => {
                    let changes =
                        filter.request_header_modifier.as_ref().ok_or_else(|| missing("requestHeaderModifier"))?;
                    // The name that a request is for is an own field of requests, which URLRewrite changes.
                    filters.push(Filter::RequestHeaders(header_changes(changes, &place)?));
                }
                "ResponseHeaderModifier" => {
                    let changes =
                        filter.response_header_modifier.as_ref().ok_or_else(|| missing("responseHeaderModifier"))?;
                    filters.push(Filter::ResponseHeaders(header_changes(changes, &place)?));
                }
                "URLRewrite" => {
                    let rewrite = filter.url_rewrite.as_ref().ok_or_else(|| missing("urlRewrite"))?;
                    if let Some(host) = &rewrite.hostname {
                        let host = HeaderValue::from_str(host)
                            .map_err(|_| unsupported(format!("{place}.urlRewrite.hostname {host:?} is no host")))?;
                        filters.push(Filter::RewriteHost(host));
                    }
                    if let Some(path) = &rewrite.path {
                        filters.push(Filter::RewritePath(path_rewrite(
                            path,
                            &format!("{place}.urlRewrite.path"),
                            matches,
                        )?));
                    }
                }
                "RequestRedirect" => {
                    let wanted = filter.request_redirect.as_ref().ok_or_else(|| missing("requestRedirect"))?;
                    *redirect = Some(redirect_of(wanted, &place, matches)?);
                }
                "RequestMirror" => {
                    let mirror = filter.request_mirror.as_ref().ok_or_else(|| missing("requestMirror"))?;
                    let (part, whole) = match (&mirror.fraction, mirror.percent) {
                        (Some(fraction), _) => (fraction.numerator, fraction.denominator.max(1)),
                        (None, Some(percent)) => (percent, 100),
                        (None, None) => (1, 1),
                    };
                    match self.lookup.find(&mirror.backend_ref) {
                        Ok(found) => filters.push(Filter::Mirror(Arc::new(Mirror {
                            to: MirrorTo::Service { upstream: found.upstream, tls: found.tls },
                            part,
                            whole,
                        }))),
                        Err(problem) => self.lookup.problems.push(problem),
                    }
                }
                "CORS" => {
                    let cors = filter.cors.as_ref().ok_or_else(|| missing("cors"))?;
                    filters.push(Filter::Cors(Arc::new(cors_of(cors, &place)?)));
                }
                other => {
                    return Err(unsupported(format!("{place}: filter {other} is not served; take it out")));
                }
            }
        }
        Ok(filters)
    }

    fn policy(&self) -> Result<Policy, Problem> {
        let place = self.place;
        if self.rule.session_persistence.is_some() {
            return Err(unsupported(format!("{place}.sessionPersistence is not served; take it out")));
        }
        if self.rule.retry.is_some() {
            return Err(unsupported(format!(
                "{place}.retry is not served; requests that may be repeated are tried on other endpoints anyway"
            )));
        }
        let mut policy = Policy { protocol: protocol(self.lookup.kind), ..Policy::default() };
        let time = |text: &Option<String>, field: &str| match text {
            Some(text) => duration(text)
                .ok_or_else(|| unsupported(format!("{place}.timeouts.{field} {text:?} is no duration such as 1m30s"))),
            None => Ok(None),
        };
        policy.request_timeout = time(&self.rule.timeouts.request, "request")?;
        if let Some(limit) = time(&self.rule.timeouts.backend_request, "backendRequest")? {
            policy.read_timeout = limit;
        } else if policy.request_timeout.is_some_and(|limit| limit > policy.read_timeout) {
            policy.read_timeout = policy.request_timeout.unwrap_or_default();
        }
        Ok(policy)
    }
}

fn protocol(kind: RouteType) -> BackendProtocol {
    if kind == RouteType::Grpc { BackendProtocol::H2c } else { BackendProtocol::Http1 }
}

/// A duration of Gateway API (GEP-2257), such as `1h30m` or `500ms`. `Some(None)`: zero, which means no limit.
fn duration(text: &str) -> Option<Option<Duration>> {
    let (mut total, mut rest) = (Duration::ZERO, text);
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = rest.split_at(digits);
        let number: u64 = number.parse().ok().filter(|_| digits <= 5)?;
        let letters = unit.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, after) = unit.split_at(letters);
        total += match unit {
            "h" => Duration::from_secs(number * 3600),
            "m" => Duration::from_secs(number * 60),
            "s" => Duration::from_secs(number),
            "ms" => Duration::from_millis(number),
            _ => return None,
        };
        rest = after;
    }
    Some((!total.is_zero()).then_some(total))
}

fn whole(pattern: &str, place: &str) -> Result<Regex, Problem> {
    RegexBuilder::new(&format!("^(?:{pattern})$")).size_limit(PATTERN_LIMIT).build().map_err(|error| {
        let last = error.to_string().lines().last().unwrap_or_default().to_owned();
        unsupported(format!("{place} {pattern:?} is no regular expression: {last}"))
    })
}

fn value_match(kind: Option<&str>, value: Option<&str>, place: &str) -> Result<ValueMatch, Problem> {
    let value = value.unwrap_or_default();
    match kind.unwrap_or("Exact") {
        "Exact" => Ok(ValueMatch::Exact(value.into())),
        "RegularExpression" => Ok(ValueMatch::Pattern(whole(value, &format!("{place}.value"))?)),
        other => Err(unsupported(format!("{place}.type {other} is neither Exact nor RegularExpression"))),
    }
}

fn http_path(wanted: &RouteMatch, place: &str) -> Result<(String, PathMatch), Problem> {
    let path = wanted.path.as_ref();
    let value = path.and_then(|path| path.value.as_deref()).unwrap_or("/");
    let kind = path.and_then(|path| path.r#type.as_deref()).unwrap_or("PathPrefix");
    if !value.starts_with('/') {
        return Err(unsupported(format!("{place}.path.value {value:?} does not begin with /")));
    }
    let made = match kind {
        "Exact" => PathMatch::Exact(value.into()),
        "PathPrefix" => PathMatch::prefix(value),
        "RegularExpression" => {
            PathMatch::Pattern { regex: whole(value, &format!("{place}.path.value"))?, length: value.len() }
        }
        other => {
            let known = "write Exact, PathPrefix or RegularExpression";
            return Err(unsupported(format!("{place}.path.type is {other}; {known}")));
        }
    };
    Ok((value.to_owned(), made))
}

fn grpc_path(wanted: &GrpcMethod, place: &str) -> Result<(String, PathMatch), Problem> {
    let kind = wanted.r#type.as_deref().unwrap_or("Exact");
    let part = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let made = match (kind, part(&wanted.service), part(&wanted.method)) {
        ("Exact" | "RegularExpression", None, None) => ("/".to_owned(), PathMatch::prefix("/")),
        ("Exact", Some(service), Some(method)) => {
            let path = format!("/{service}/{method}");
            (path.clone(), PathMatch::Exact(path.into()))
        }
        ("Exact", Some(service), None) => (format!("/{service}"), PathMatch::prefix(&format!("/{service}"))),
        ("Exact", None, Some(method)) => {
            let text = format!("/*/{method}");
            let regex = whole(&format!("/[^/]+/{}", regex::escape(&method)), place)?;
            (text.clone(), PathMatch::Pattern { regex, length: method.len() })
        }
        ("RegularExpression", service, method) => {
            let any = "[^/]+".to_owned();
            let length = service.as_ref().map_or(0, String::len) + method.as_ref().map_or(0, String::len);
            let text = format!("/{}/{}", service.unwrap_or_else(|| any.clone()), method.unwrap_or(any));
            let regex = whole(&text, &format!("{place}.method"))?;
            (text, PathMatch::Pattern { regex, length })
        }
        (other, ..) => {
            return Err(unsupported(format!("{place}.method.type {other} is neither Exact nor RegularExpression")));
        }
    };
    Ok(made)
}

fn header_changes(wanted: &HeaderModifier, place: &str) -> Result<HeaderChanges, Problem> {
    let name = |text: &str| {
        HeaderName::from_bytes(text.as_bytes())
            .map_err(|_| unsupported(format!("{place}: {text:?} is no header's name")))
    };
    let pair = |header: &super::objects::Header| {
        let value = HeaderValue::from_str(&header.value)
            .map_err(|_| unsupported(format!("{place}: {:?} cannot be a header's value", header.value)))?;
        Ok((name(&header.name)?, value))
    };
    Ok(HeaderChanges {
        set: wanted.set.iter().map(pair).collect::<Result<_, _>>()?,
        add: wanted.add.iter().map(pair).collect::<Result<_, _>>()?,
        remove: wanted.remove.iter().map(|text| name(text)).collect::<Result<_, _>>()?,
    })
}

fn path_rewrite(
    wanted: &PathModifier,
    place: &str,
    matches: &[(String, PathMatch, Matches)],
) -> Result<PathRewrite, Problem> {
    match wanted.r#type.as_str() {
        "ReplaceFullPath" => {
            let path = wanted.replace_full_path.as_deref().unwrap_or_default();
            Ok(PathRewrite::Full(if path.is_empty() { "/".into() } else { path.into() }))
        }
        "ReplacePrefixMatch" => {
            if !matches.iter().all(|(_, path, _)| matches!(path, PathMatch::Prefix(_))) {
                return Err(unsupported(format!("{place}: ReplacePrefixMatch wants matches of type PathPrefix only")));
            }
            Ok(PathRewrite::Prefix(wanted.replace_prefix_match.as_deref().unwrap_or_default().into()))
        }
        other => Err(unsupported(format!("{place}.type {other} is neither ReplaceFullPath nor ReplacePrefixMatch"))),
    }
}

fn redirect_of(
    wanted: &super::objects::Redirect,
    place: &str,
    matches: &[(String, PathMatch, Matches)],
) -> Result<Redirect, Problem> {
    let scheme = match wanted.scheme.as_deref() {
        None => None,
        Some("http") => Some("http"),
        Some("https") => Some("https"),
        Some(other) => {
            return Err(unsupported(format!("{place}.requestRedirect.scheme {other} is neither http nor https")));
        }
    };
    let status = wanted.status_code.unwrap_or(302);
    let status = StatusCode::from_u16(status)
        .ok()
        .filter(|_| [301, 302, 303, 307, 308].contains(&status))
        .ok_or_else(|| unsupported(format!("{place}.requestRedirect.statusCode {status} is no redirect")))?;
    let path = wanted.path.as_ref();
    Ok(Redirect {
        status,
        scheme,
        host: wanted.hostname.as_deref().map(Into::into),
        port: wanted.port,
        path: path.map(|path| path_rewrite(path, &format!("{place}.requestRedirect.path"), matches)).transpose()?,
        location: None,
    })
}

fn cors_of(wanted: &CorsFilter, place: &str) -> Result<Cors, Problem> {
    let list = |held: &[String], field: &str| {
        HeaderValue::from_str(&held.join(", "))
            .map_err(|_| unsupported(format!("{place}.cors.{field} holds what cannot be a header's value")))
    };
    let max_age = u64::try_from(wanted.max_age.unwrap_or(5)).unwrap_or_default();
    Ok(Cors {
        origins: wanted.allow_origins.iter().map(|origin| origin.as_str().into()).collect(),
        methods: list(&wanted.allow_methods, "allowMethods")?,
        headers: list(&wanted.allow_headers, "allowHeaders")?,
        expose: (!wanted.expose_headers.is_empty())
            .then(|| list(&wanted.expose_headers, "exposeHeaders"))
            .transpose()?,
        credentials: wanted.allow_credentials.unwrap_or_default(),
        max_age: Duration::from_secs(max_age),
        reflects: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_the_api() {
        for (text, wanted) in [
            ("1h30m", Some(Some(Duration::from_secs(5400)))),
            ("500ms", Some(Some(Duration::from_millis(500)))),
            ("1s500ms", Some(Some(Duration::from_millis(1500)))),
            ("0s", Some(None)),
            ("", None),
            ("1", None),
            ("1d", None),
            ("-1s", None),
            ("123456s", None),
        ] {
            assert_eq!(duration(text), wanted, "{text}");
        }
    }
}
