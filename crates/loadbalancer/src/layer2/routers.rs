//! Virtual routers beside the vote: while this node is active in one, it announces its addresses.

use std::time::Duration;

use linux::link::Links;
use tracing::warn;

use super::{Notice, Worker};
use crate::vrrp::instance::{Instance, RouterConfig};
use crate::vrrp::machine::{Action, State};

/// A virtual router, and until when others wait for it to speak.
pub(super) struct Router {
    /// As it was ordered.
    pub order: RouterConfig,
    pub instance: Instance,
    pub until: Duration,
}

impl Router {
    /// Does what its machine says; whether everybody is to hear again where its addresses are.
    fn act(&mut self, actions: Vec<Action>, now: Duration) -> bool {
        for action in &actions {
            if let Action::Advertise(priority) = action {
                self.instance.advertise(*priority);
                // Those that hear it wait for three of its intervals at least (RFC 9568, section 6.1).
                self.until = now + self.order.settings.interval * 3;
            }
        }
        actions.contains(&Action::TellAgain)
    }

    pub fn is_active(&self) -> bool {
        self.instance.machine.state() == State::Active
    }
}

impl Worker {
    /// Begins and ends virtual routers; one of which more than the addresses is another now begins anew.
    pub(super) fn set_routers(&mut self, orders: Vec<RouterConfig>) {
        let order_of = |router: &Router| orders.iter().find(|order| order.is_same_router(&router.order));
        let (stay, gone): (Vec<Router>, Vec<Router>) =
            std::mem::take(&mut self.routers).into_iter().partition(|router| order_of(router).is_some());
        self.routers = stay;
        for router in &mut self.routers {
            let order = orders.iter().find(|order| order.is_same_router(&router.order));
            // Its addresses may be others: it keeps what it is.
            if let Some(order) = order.filter(|order| order.addresses != router.order.addresses) {
                router.instance.set_addresses(order.addresses.clone());
                router.order = order.clone();
            }
        }
        // Silent first, and then it says so.
        self.decide();
        gone.into_iter().for_each(|router| self.end(router));
        for order in orders {
            if self.routers.iter().any(|router| router.order.is_same_router(&order)) {
                continue;
            }
            let mut config = order.clone();
            if config.interface.is_empty() {
                config.interface = self.interfaces.first().map(|own| own.name.clone()).unwrap_or_default();
            }
            match Instance::open(config) {
                Ok(instance) => {
                    let mut router = Router { order, instance, until: Duration::ZERO };
                    let now = self.now();
                    let actions = router.instance.want(true, now);
                    router.act(actions, now);
                    self.routers.push(router);
                }
                Err(error) => {
                    warn!(%error, "a virtual router has no part here");
                    (self.notice)(Notice::Refused(order.name, error.to_string()));
                }
            }
        }
    }

    pub(super) fn end(&self, mut router: Router) {
        let actions = router.instance.want(false, self.now());
        router.act(actions, self.now());
    }

    /// Hears and says what virtual routers do.
    pub(super) fn route(&mut self) {
        let now = self.now();
        let looked = self.watch.has_changed() && !self.routers.is_empty();
        let links = looked.then(Links::current).and_then(Result::ok);
        for router in &mut self.routers {
            let mut actions = links.as_ref().map(|links| router.instance.look(links, now)).unwrap_or_default();
            actions.extend(router.instance.hear(now));
            actions.extend(router.instance.machine.tick(now));
            if router.act(actions, now) {
                self.bursts.push((now, 0, router.instance.config.addresses.iter().copied().collect()));
            }
        }
    }
}
