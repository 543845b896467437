//! Whether what an address is for answers.

use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::info;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Too few results in a row.
    Unknown,
    Good,
    Bad,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Tcp(SocketAddr),
    /// Scheme, address and path. Certificates are not checked.
    Http(String, SocketAddr, String),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        let wrong = || "write tcp://ADDRESS:PORT, http://ADDRESS:PORT/PATH or https://ADDRESS:PORT/PATH".to_owned();
        let (scheme, rest) = text.split_once("://").ok_or_else(wrong)?;
        let (address, path) = rest.split_once('/').unwrap_or((rest, ""));
        let address = address.parse().map_err(|_| wrong())?;
        match scheme {
            "tcp" if path.is_empty() => Ok(Target::Tcp(address)),
            "http" | "https" => Ok(Target::Http(scheme.to_owned(), address, format!("/{path}"))),
            _ => Err(wrong()),
        }
    }
}

impl Target {
    async fn ask(&self) -> Result<(), String> {
        match self {
            Target::Tcp(address) => {
                TcpStream::connect(address).await.map(drop).map_err(|error| format!("connect to {address}: {error}"))
            }
            Target::Http(scheme, address, path) => kubelet::probe_http(scheme, *address, path).await,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Check {
    pub target: Target,
    pub interval: Duration,
    pub timeout: Duration,
    pub fall: u32,
    pub rise: u32,
}

/// Results in a row, and what they come to.
struct Streak {
    verdict: Verdict,
    good: u32,
    bad: u32,
}

impl Streak {
    fn count(&mut self, is_good: bool, check: &Check) -> Verdict {
        (self.good, self.bad) =
            if is_good { (self.good.saturating_add(1), 0) } else { (0, self.bad.saturating_add(1)) };
        if self.good >= check.rise {
            self.verdict = Verdict::Good;
        } else if self.bad >= check.fall {
            self.verdict = Verdict::Bad;
        }
        self.verdict
    }
}

impl Check {
    /// Asks until the token is cancelled, and tells each new verdict; one that nobody took is told again.
    pub async fn run(self, tell: impl Fn(Verdict) -> bool, token: CancellationToken) {
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut streak = Streak { verdict: Verdict::Unknown, good: 0, bad: 0 };
        let mut told = Verdict::Unknown;
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = token.cancelled() => return,
            }
            let result = tokio::time::timeout(self.timeout, self.target.ask()).await;
            let result = result.unwrap_or_else(|_| Err(format!("no answer within {:?}", self.timeout)));
            let verdict = streak.count(result.is_ok(), &self);
            if verdict != told {
                info!(check = ?self.target, ?verdict, why = result.err(), "another verdict");
                if tell(verdict) {
                    told = verdict;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read() {
        let address = |text: &str| text.parse::<SocketAddr>().expect("an address");
        for (text, expected) in [
            ("tcp://127.0.0.1:6443", Some(Target::Tcp(address("127.0.0.1:6443")))),
            ("https://[::1]:6443/readyz", Some(Target::Http("https".into(), address("[::1]:6443"), "/readyz".into()))),
            ("http://127.0.0.1:80", Some(Target::Http("http".into(), address("127.0.0.1:80"), "/".into()))),
            ("tcp://localhost:80", None),
            ("tcp://127.0.0.1:80/x", None),
            ("ftp://127.0.0.1:80", None),
            ("127.0.0.1:80", None),
        ] {
            assert_eq!(text.parse::<Target>().ok(), expected, "{text}");
        }
    }

    #[test]
    fn a_verdict_needs_its_results_in_a_row() {
        let second = Duration::from_secs(1);
        let target = Target::Tcp("127.0.0.1:1".parse().expect("an address"));
        let check = Check { target, interval: second, timeout: second, fall: 2, rise: 2 };
        let mut streak = Streak { verdict: Verdict::Unknown, good: 0, bad: 0 };
        let seen = [true, false, false, true, false, true, true].map(|good| streak.count(good, &check));
        use Verdict::{Bad, Good, Unknown};
        assert_eq!(seen, [Unknown, Unknown, Bad, Bad, Bad, Bad, Good]);
    }
}
