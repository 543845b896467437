//! Reads upstream servers and search domains from the text of a resolv.conf.

use std::net::{IpAddr, SocketAddr};

/// What a resolv.conf says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ResolvConf {
    /// The `nameserver` lines, on port 53, in order.
    pub servers: Vec<SocketAddr>,
    /// The last `search` or `domain` line.
    pub search: Vec<String>,
}

/// Lines that are no address are left out, as resolvers do.
pub fn parse_resolv_conf(text: &str) -> ResolvConf {
    let mut found = ResolvConf::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                let server = words.next().and_then(|word| word.parse::<IpAddr>().ok());
                if let Some(server) = server.map(|ip| SocketAddr::new(ip, 53))
                    && !found.servers.contains(&server)
                {
                    found.servers.push(server);
                }
            }
            Some("search" | "domain") => {
                found.search = words.map(|word| word.trim_end_matches('.').to_owned()).collect();
                found.search.retain(|domain| !domain.is_empty());
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::parse_resolv_conf;

    #[test]
    fn comments_options_and_nonsense_are_passed_over() {
        let text = "# made by hand\nsearch a b\nnameserver 192.0.2.1\nnameserver  2001:db8::1 \nnameserver nope\n\
                    options ndots:5\nnameserver 192.0.2.1\n;nameserver 192.0.2.9\n";
        let found = parse_resolv_conf(text);
        let servers: Vec<String> = found.servers.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["192.0.2.1:53", "[2001:db8::1]:53"]);
        assert_eq!(found.search, ["a", "b"]);
        assert!(parse_resolv_conf("search .\n").search.is_empty());
    }
}
