//! Reads `auth-tls-*`. What makes no sense keeps everybody out: whoever wrote it wanted a door.

use regex::Regex;

use super::read;
use crate::clients::{Asks, Wanted};

/// The annotations before they are put together.
#[derive(Default)]
pub struct Draft {
    is_asked_for: bool,
    is_off: bool,
    wanted: Wanted,
}

impl Draft {
    pub fn read(&mut self, key: &str, namespace: &str, text: &str) -> Option<Result<(), String>> {
        let result = match key {
            "auth-tls-secret" => {
                self.is_asked_for = true;
                read::own_name(text, namespace, "Secret").map(|name| self.wanted.secret = Some(name))
            }
            "auth-tls-verify-client" => self.verify(text),
            "auth-tls-verify-depth" => match text.parse() {
                Ok(depth @ 0..=16) => {
                    self.wanted.depth = if depth == 0 { 1 } else { depth };
                    Ok(())
                }
                _ => Err("is no number of certificates between 1 and 16".to_owned()),
            },
            "auth-tls-match-cn" => match Regex::new(text) {
                Ok(regex) if text.starts_with("CN=") => {
                    self.wanted.subject = Some(regex);
                    Ok(())
                }
                _ => Err("is no regular expression that begins with CN=".to_owned()),
            },
            "auth-tls-error-page" => return Some(read::location(text).map(|to| self.wanted.error_page = Some(to))),
            "auth-tls-pass-certificate-to-upstream" => {
                return Some(read::flag(text).map(|on| self.wanted.passes_certificate = on));
            }
            _ => return None,
        };
        self.wanted.is_broken |= result.is_err();
        Some(result)
    }

    fn verify(&mut self, text: &str) -> Result<(), String> {
        self.is_off = text == "off";
        self.wanted.asks = match text {
            "on" | "off" => Asks::Always,
            "optional" => Asks::IfShown,
            "optional_no_ca" => Asks::AnyAuthority,
            _ => return Err("is neither on, off, optional nor optional_no_ca".to_owned()),
        };
        Ok(())
    }

    pub fn finish(self) -> Option<Wanted> {
        (self.is_asked_for && (!self.is_off || self.wanted.is_broken)).then_some(self.wanted)
    }
}
