//! Reads where copies of requests go.

use http::HeaderValue;

use super::read;
use crate::route::MirrorUrl;
use crate::url::Url;
use crate::variables::Template;

/// The annotations before they are put together.
#[derive(Default)]
pub struct Draft {
    url: Option<Url>,
    host: Option<Template>,
    lacks_body: bool,
    /// `mirror-target` is there, whether it makes sense or not.
    is_asked_for: bool,
}

impl Draft {
    pub fn read(&mut self, key: &str, text: &str) -> Option<Result<(), String>> {
        Some(match key {
            "mirror-target" => {
                self.is_asked_for = true;
                Url::parse(text).map(|url| self.url = Some(url))
            }
            "mirror-host" => host(text).map(|host| self.host = Some(host)),
            "mirror-request-body" => read::switch(text).map(|is_on| self.lacks_body = !is_on),
            _ => return None,
        })
    }

    /// Something is said about copies, and there are none.
    pub fn lacks_target(&self) -> bool {
        (self.host.is_some() || self.lacks_body) && !self.is_asked_for
    }

    pub fn finish(self) -> Option<MirrorUrl> {
        self.url.map(|url| MirrorUrl { url, host: self.host, has_body: !self.lacks_body })
    }
}

fn host(text: &str) -> Result<Template, String> {
    match HeaderValue::from_str(text) {
        Ok(_) if !text.is_empty() && !text.contains([' ', '/', '?', '#', '@']) => Template::parse(text),
        _ => Err("is no host name".to_owned()),
    }
}
