//! Reads `auth-url` and its family. One that makes no sense keeps everybody out: whoever wrote it wanted a door.

use std::time::Duration;

use http::{HeaderName, HeaderValue, Method};

use super::read;
use crate::external::{Question, Remembering, Signin};
use crate::url::Url;
use crate::variables::Template;

/// The annotations before they are put together.
#[derive(Default)]
pub struct Draft {
    url: Option<Url>,
    /// It is there, whether it makes sense or not.
    is_asked_for: bool,
    is_broken: bool,
    method: Option<Method>,
    signin: Option<Template>,
    argument: Option<Box<str>>,
    passed: Vec<HeaderName>,
    redirect: Option<Template>,
    headers: Option<Box<str>>,
    always_sets_cookie: bool,
    cache_key: Option<Template>,
    statuses: Option<Vec<(u16, Duration)>>,
}

/// Who is asked, if anybody.
#[derive(Clone, Debug)]
pub enum Door {
    Asks(Box<Question>),
    /// Nobody can be asked, and nobody gets in.
    Shut,
}

impl Draft {
    /// The annotation `auth-…` is one of ours: what is wrong with it shuts the door.
    pub fn read(&mut self, key: &str, namespace: &str, text: &str) -> Option<Result<(), String>> {
        let result = match key {
            "auth-url" => {
                self.is_asked_for = true;
                Url::parse(text).map(|url| self.url = Some(url))
            }
            "auth-method" => method(text).map(|method| self.method = Some(method)),
            "auth-response-headers" => header_names(text).map(|names| self.passed = names),
            "auth-proxy-set-headers" => {
                read::own_name(text, namespace, "ConfigMap").map(|name| self.headers = Some(name))
            }
            // What is wrong with the others opens nothing.
            _ => return self.read_more(key, text),
        };
        self.is_broken |= result.is_err();
        Some(result)
    }

    fn read_more(&mut self, key: &str, text: &str) -> Option<Result<(), String>> {
        Some(match key {
            "auth-signin" => signin(text).map(|url| self.signin = Some(url)),
            "auth-signin-redirect-param" => match text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.~".contains(c))
            {
                true if !text.is_empty() => {
                    self.argument = Some(text.into());
                    Ok(())
                }
                _ => Err("is no name of an argument".to_owned()),
            },
            "auth-request-redirect" => {
                read::header(text).and_then(|_| Template::parse(text)).map(|to| self.redirect = Some(to))
            }
            "auth-always-set-cookie" => read::flag(text).map(|on| self.always_sets_cookie = on),
            "auth-cache-key" => Template::parse(text).map(|key| self.cache_key = Some(key)),
            "auth-cache-duration" => durations(text).map(|statuses| self.statuses = Some(statuses)),
            // Connections are kept as those to endpoints are, and X-Request-ID is the same for both.
            "auth-keepalive" | "auth-keepalive-requests" | "auth-keepalive-timeout" => read::number(text).map(drop),
            // There is nobody who would be asked for all Ingresses.
            "auth-keepalive-share-vars" | "enable-global-auth" => read::flag(text).map(drop),
            _ => return None,
        })
    }

    /// Something is said about asking, and nobody is to be asked.
    pub fn lacks_url(&self) -> bool {
        let is_said =
            self.method.is_some() || self.signin.is_some() || !self.passed.is_empty() || self.headers.is_some();
        is_said && !self.is_asked_for
    }

    pub fn finish(self) -> Option<Door> {
        if !self.is_asked_for {
            return None;
        }
        let (Some(url), false) = (self.url, self.is_broken) else { return Some(Door::Shut) };
        let argument = self.argument.unwrap_or_else(|| "rd".into());
        let statuses =
            self.statuses.unwrap_or_else(|| [200, 202, 401].map(|status| (status, Duration::from_secs(300))).into());
        Some(Door::Asks(Box::new(Question {
            url,
            method: self.method,
            signin: self.signin.map(|url| Signin { url, argument }),
            passed: self.passed,
            redirect: self.redirect,
            always_sets_cookie: self.always_sets_cookie,
            remembering: self.cache_key.map(|key| Remembering { key, statuses }),
            headers: self.headers,
        })))
    }
}

fn method(text: &str) -> Result<Method, String> {
    match text {
        "GET" | "HEAD" | "POST" | "PUT" | "PATCH" | "DELETE" | "OPTIONS" => {
            Method::from_bytes(text.as_bytes()).map_err(|_| "is no method".to_owned())
        }
        _ => Err("is no method that can be asked with; write GET, HEAD or POST".to_owned()),
    }
}

fn header_names(text: &str) -> Result<Vec<HeaderName>, String> {
    let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
    names
        .map(|name| HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("holds {name:?}, which is no header")))
        .collect()
}

fn signin(text: &str) -> Result<Template, String> {
    let is_place = text.starts_with("http://") || text.starts_with("https://") || text.starts_with(['/', '$']);
    match HeaderValue::from_str(text) {
        Ok(_) if is_place && !text.contains(' ') => Template::parse(text),
        _ => Err("is no URL; write https://host/path".to_owned()),
    }
}

/// `200 202 10m, 401 5m`: statuses and how long their answers hold; without a status those of 200, 301 and 302.
fn durations(text: &str) -> Result<Vec<(u16, Duration)>, String> {
    let wrong = || "is no list such as 200 202 10m, 401 5m".to_owned();
    let mut all = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let mut statuses: Vec<u16> = Vec::new();
        let mut time = Duration::ZERO;
        for word in part.split_whitespace() {
            match word.parse::<u16>() {
                Ok(status @ 100..=599) if time.is_zero() && word.len() == 3 => statuses.push(status),
                _ => time += span(word).ok_or_else(wrong)?,
            }
        }
        if time.is_zero() {
            return Err(wrong());
        }
        if statuses.is_empty() {
            statuses = vec![200, 301, 302];
        }
        all.extend(statuses.into_iter().map(|status| (status, time)));
    }
    match all.is_empty() {
        true => Err(wrong()),
        false => Ok(all),
    }
}

/// A time as nginx writes it, with its unit.
fn span(word: &str) -> Option<Duration> {
    let (digits, unit) = word.split_at(word.find(|c: char| !c.is_ascii_digit())?);
    let count: u64 = digits.parse().ok()?;
    let seconds = match unit {
        "ms" => return Some(Duration::from_millis(count)),
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        "w" => 604_800,
        "M" => 2_592_000,
        "y" => 31_536_000,
        _ => return None,
    };
    Some(Duration::from_secs(count.saturating_mul(seconds).min(31_536_000)))
}
