//! Headers that a ConfigMap names, each key a name: for whom the proxy asks, or for clients.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::variables::{Facts, Template};

/// What of a message says where it ends and how it is carried is the proxy's to say.
const OWN: [&str; 7] = ["connection", "content-length", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"];

/// The headers of a ConfigMap, by name.
#[derive(Debug, PartialEq, Eq)]
pub struct SetHeaders {
    all: Vec<(HeaderName, HeaderValue)>,
    /// The same with variables, or which of them is not known.
    filled: Result<Vec<(HeaderName, Template)>, String>,
}

impl SetHeaders {
    /// Reads the data of a ConfigMap.
    ///
    /// # Errors
    /// Says which key or value is no header.
    pub fn read(data: &HashMap<String, String>) -> Result<Arc<Self>, String> {
        let mut all = Vec::new();
        let mut filled = Ok(Vec::new());
        let sorted: BTreeMap<&String, &String> = data.iter().collect();
        for (key, value) in sorted {
            let name =
                HeaderName::from_bytes(key.as_bytes()).map_err(|_| format!("has the key {key}, which is no header"))?;
            if OWN.contains(&name.as_str()) {
                return Err(format!("has the key {key}, which the proxy says itself"));
            }
            let plain = HeaderValue::from_str(value)
                .map_err(|_| format!("has a value of {key} that cannot stand in a header"))?;
            let template = Template::parse(value).map_err(|problem| format!("has a value of {key} that {problem}"));
            match (&mut filled, template) {
                (Ok(filled), Ok(template)) => filled.push((name.clone(), template)),
                (Ok(_), Err(problem)) => filled = Err(problem),
                (Err(_), _) => {}
            }
            all.push((name, plain));
        }
        Ok(Arc::new(SetHeaders { all, filled }))
    }

    /// Sets them all as they are written.
    pub fn set(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.all {
            headers.insert(name, value.clone());
        }
    }

    /// Sets them all with variables filled in; what is empty takes a header away, as in nginx. `None`: one is not known.
    pub fn fill(&self, headers: &mut HeaderMap, facts: &Facts<'_>) -> Option<()> {
        for (name, value) in self.filled.as_ref().ok()? {
            match HeaderValue::try_from(value.fill(facts)) {
                Ok(value) if !value.is_empty() => drop(headers.insert(name, value)),
                Ok(_) | Err(_) => drop(headers.remove(name)),
            }
        }
        Some(())
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

    /// Why there are none, for people; with variables those must be known.
    pub fn problem(&self, has_variables: bool) -> Option<&str> {
        match self {
            HeadersState::Unknown => None,
            HeadersState::Good(headers) if has_variables => headers.filled.as_ref().err().map(String::as_str),
            HeadersState::Good(_) => None,
            HeadersState::Missing => Some("is not there"),
            HeadersState::Broken(problem) => Some(problem),
        }
    }
}
