//! What the load balancer can be told, the same for a server, a node's agent and `up`.

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::dns::Switch;

#[derive(Args, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoadBalancerOptions {
    /// Give LoadBalancer Services addresses and announce them; off for a cluster where another does, such as
    /// `fairlead loadbalancer` or MetalLB.
    #[arg(long, value_enum, default_value = "on")]
    pub load_balancer: Switch,
    /// Serve Services without a loadBalancerClass, too; off where another load balancer does.
    #[arg(long, value_enum, default_value = "on")]
    pub load_balancer_classless: Switch,
}

impl LoadBalancerOptions {
    pub fn is_on(&self) -> bool {
        self.load_balancer == Switch::On
    }

    pub fn serves_classless(&self) -> bool {
        self.load_balancer_classless == Switch::On
    }

    /// The same as flags, for a process that is started with them.
    pub fn flags(&self) -> Vec<String> {
        let text = |switch: Switch| format!("{switch:?}").to_ascii_lowercase();
        vec![
            format!("--load-balancer={}", text(self.load_balancer)),
            format!("--load-balancer-classless={}", text(self.load_balancer_classless)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: LoadBalancerOptions,
    }

    #[test]
    fn flags_say_what_they_were_made_from() {
        for given in [vec!["--load-balancer=off"], vec!["--load-balancer-classless=off"], vec![]] {
            let parse = |flags: Vec<&str>| {
                let line = ["fairlead"].into_iter().chain(flags);
                Line::try_parse_from(line).expect("good flags").options
            };
            let options = parse(given.clone());
            assert_eq!(options == LoadBalancerOptions::default(), given.is_empty());
            let flags = options.flags();
            assert_eq!(parse(flags.iter().map(String::as_str).collect()), options);
        }
    }
}
