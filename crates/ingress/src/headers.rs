//! Headers that a ConfigMap names, each key a name: for whom the proxy asks, or for clients.

use std::collections::HashMap;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::variables::{Facts, Template};

/// What of a message says where it ends and how it is carried is the proxy's to say.
const OWN: [&str; 7] = ["connection", "content-length", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"];

/// The headers of a ConfigMap, by name.
#[derive(Debug, PartialEq, Eq)]
pub struct SetHeaders(Vec<(HeaderName, Template)>);

impl SetHeaders {
    /// Reads the data of a ConfigMap; values may hold variables.
    ///
    /// # Errors
    /// Says which key or value is no header.
    pub fn read(data: &HashMap<String, String>) -> Result<Arc<Self>, String> {
        let mut all = Vec::new();
        for (key, value) in data {
            let name =
                HeaderName::from_bytes(key.as_bytes()).map_err(|_| format!("has the key {key}, which is no header"))?;
            if OWN.contains(&name.as_str()) {
                return Err(format!("has the key {key}, which the proxy says itself"));
            }
            if HeaderValue::from_str(value).is_err() {
                return Err(format!("has a value of {key} that cannot stand in a header"));
            }
            let value = Template::parse(value).map_err(|problem| format!("has a value of {key} that {problem}"))?;
            all.push((name, value));
        }
        all.sort_by(|a, b| a.0.as_str().cmp(b.0.as_str()));
        Ok(Arc::new(SetHeaders(all)))
    }

    /// Sets them all; what is empty takes a header away, as in nginx.
    pub fn apply(&self, headers: &mut HeaderMap, facts: &Facts<'_>) {
        for (name, value) in &self.0 {
            match HeaderValue::try_from(value.fill(facts)) {
                Ok(value) if !value.is_empty() => drop(headers.insert(name, value)),
                Ok(_) | Err(_) => drop(headers.remove(name)),
            }
        }
    }

    pub fn names(&self) -> impl Iterator<Item = &HeaderName> {
        self.0.iter().map(|(name, _)| name)
    }
}

/// A ConfigMap with headers, as it was last seen.
#[derive(Clone, Debug)]
pub enum HeadersState {
    /// Nobody has looked yet.
    Unknown,
    Missing,
    /// Says what is wrong.
    Broken(String),
    Good(Arc<SetHeaders>),
}

impl HeadersState {
    /// From its `data`; `None`: there is no such ConfigMap.
    pub fn of(data: Option<&HashMap<String, String>>) -> Self {
        let Some(data) = data else { return HeadersState::Missing };
        SetHeaders::read(data).map_or_else(HeadersState::Broken, HeadersState::Good)
    }

    pub fn headers(&self) -> Option<Arc<SetHeaders>> {
        match self {
            HeadersState::Good(headers) => Some(headers.clone()),
            HeadersState::Unknown | HeadersState::Missing | HeadersState::Broken(_) => None,
        }
    }

    /// Why there are none, for people.
    pub fn problem(&self) -> Option<&str> {
        match self {
            HeadersState::Unknown | HeadersState::Good(_) => None,
            HeadersState::Missing => Some("is not there"),
            HeadersState::Broken(problem) => Some(problem),
        }
    }
}
