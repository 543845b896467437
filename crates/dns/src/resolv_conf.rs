//! Reads upstream servers from the text of a resolv.conf.

use std::net::{IpAddr, SocketAddr};

/// The `nameserver` lines, on port 53, in order. Lines that are no address are left out, as resolvers do.
pub fn parse_resolv_conf(text: &str) -> Vec<SocketAddr> {
    let mut servers: Vec<SocketAddr> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let server = words.next().and_then(|word| word.parse::<IpAddr>().ok());
        if let Some(server) = server.map(|ip| SocketAddr::new(ip, 53))
            && !servers.contains(&server)
        {
            servers.push(server);
        }
    }
    servers
}

#[cfg(test)]
mod tests {
    use super::parse_resolv_conf;

    #[test]
    fn comments_options_and_nonsense_are_passed_over() {
        let text = "# made by hand\nsearch a b\nnameserver 192.0.2.1\nnameserver  2001:db8::1 \nnameserver nope\n\
                    options ndots:5\nnameserver 192.0.2.1\n;nameserver 192.0.2.9\n";
        let servers: Vec<String> = parse_resolv_conf(text).iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["192.0.2.1:53", "[2001:db8::1]:53"]);
    }
}
