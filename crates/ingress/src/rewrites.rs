//! What an endpoint says about places and is changed on the way out: where a redirect leads, and for whom a cookie is
//! (`proxy_redirect`, `proxy_cookie_domain` and `proxy_cookie_path` in nginx).

use http::header::{HeaderMap, HeaderValue, LOCATION, REFRESH, SET_COOKIE};

/// One text in place of another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replacement {
    pub from: Box<str>,
    pub to: Box<str>,
}

impl Replacement {
    /// The text with its beginning replaced, if that is ours to replace.
    fn of_beginning(&self, text: &str) -> Option<String> {
        text.strip_prefix(&*self.from).map(|rest| format!("{}{rest}", self.to))
    }

    /// Changes the beginning of `Location`, and of the URL in `Refresh`.
    pub fn redirects(&self, headers: &mut HeaderMap) {
        let location = headers.get(LOCATION).and_then(|value| self.of_beginning(value.to_str().ok()?));
        set(headers, &LOCATION, location);
        let refresh = headers.get(REFRESH).and_then(|value| {
            let text = value.to_str().ok()?;
            let at = text.to_ascii_lowercase().find("url=")? + 4;
            Some(format!("{}{}", &text[..at], self.of_beginning(&text[at..])?))
        });
        set(headers, &REFRESH, refresh);
    }
}

fn set(headers: &mut HeaderMap, name: &http::HeaderName, text: Option<String>) {
    if let Some(value) = text.and_then(|text| HeaderValue::try_from(text).ok()) {
        headers.insert(name, value);
    }
}

/// For whom cookies of endpoints are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CookieChanges {
    /// In place of a whole domain, in any case and with or without a dot in front.
    pub domain: Option<Replacement>,
    /// In place of a path's beginning.
    pub path: Option<Replacement>,
}

impl CookieChanges {
    pub fn apply(&self, headers: &mut HeaderMap) {
        for value in headers.iter_mut().filter(|(name, _)| **name == SET_COOKIE).map(|(_, value)| value) {
            let changed = value.to_str().ok().and_then(|text| HeaderValue::try_from(self.cookie(text)).ok());
            if let Some(changed) = changed {
                *value = changed;
            }
        }
    }

    fn cookie(&self, text: &str) -> String {
        let attribute = |part: &str| -> Option<String> {
            let (name, value) = part.split_once('=')?;
            let named = |wanted: &str| name.trim().eq_ignore_ascii_case(wanted);
            let plain = |domain: &str| domain.strip_prefix('.').unwrap_or(domain).to_ascii_lowercase();
            let value = match (&self.domain, &self.path) {
                (Some(domain), _) if named("domain") => {
                    (plain(value.trim()) == plain(&domain.from)).then(|| domain.to.to_string())?
                }
                (_, Some(path)) if named("path") => path.of_beginning(value.trim())?,
                _ => return None,
            };
            Some(format!("{name}={value}"))
        };
        // The first part is the cookie itself.
        let mut parts = text.split(';');
        let mut out = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            out.push(';');
            out.push_str(&attribute(part).unwrap_or_else(|| part.to_owned()));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replacement(from: &str, to: &str) -> Replacement {
        Replacement { from: from.into(), to: to.into() }
    }

    #[test]
    fn a_redirect_begins_elsewhere() {
        for (name, before, after) in [
            (LOCATION, "http://inner:8080/a?b=c", "https://shop.example/a?b=c"),
            (LOCATION, "http://other:8080/a", "http://other:8080/a"),
            (LOCATION, "/a", "/a"),
            (REFRESH, "5; URL=http://inner:8080/a", "5; URL=https://shop.example/a"),
            (REFRESH, "5", "5"),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(&name, HeaderValue::from_static(before));
            replacement("http://inner:8080/", "https://shop.example/").redirects(&mut headers);
            assert_eq!(headers[&name], after);
        }
    }

    #[test]
    fn a_cookie_is_for_somebody_else() {
        let changes = CookieChanges {
            domain: Some(replacement("inner.example", "shop.example")),
            path: Some(replacement("/inner/", "/")),
        };
        for (before, after) in [
            ("path=/inner/; Path=/inner/a; Domain=.Inner.example", "path=/inner/; Path=/a; Domain=shop.example"),
            ("a=b; domain=x.inner.example; path=/other", "a=b; domain=x.inner.example; path=/other"),
            ("a=b; HttpOnly", "a=b; HttpOnly"),
        ] {
            let mut headers = HeaderMap::new();
            headers.append(SET_COOKIE, HeaderValue::from_static(before));
            headers.append(SET_COOKIE, HeaderValue::from_static("c=d"));
            changes.apply(&mut headers);
            let seen: Vec<&HeaderValue> = headers.get_all(SET_COOKIE).iter().collect();
            assert_eq!(seen, [after, "c=d"]);
        }
    }
}
