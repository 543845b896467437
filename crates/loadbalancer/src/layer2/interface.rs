//! A link on which addresses are announced, and the rule that asks for the right to.

use linux::link::{Links, Mac};
use linux::nft::{Chain, Datum, Op, Rule, Statement, Transaction, Value};
use linux::packet::{PacketSocket, Protocol};

use super::{Error, MARK, RIGHT};

pub(super) struct Interface {
    pub name: String,
    /// It holds an address of the node.
    pub is_own: bool,
    pub mac: Mac,
    pub arp: PacketSocket,
    pub solicitations: PacketSocket,
}

impl Interface {
    /// What is heard and said on a link, and in the transaction the rule that asks for the right to say it. `None`: there is no
    /// such link, or it has no hardware address.
    pub fn open(links: &Links, name: &str, is_own: bool, rules: &mut Transaction) -> Result<Option<Interface>, Error> {
        let Some(link) = links.link(name)? else { return Ok(None) };
        let Some(mac) = link.mac else { return Ok(None) };
        let open =
            |protocol| PacketSocket::open(link.index, protocol, MARK).map_err(|e| Error::Packets(name.to_owned(), e));
        let (arp, solicitations) = (open(Protocol::Arp)?, open(Protocol::NeighbourSolicitation)?);
        let chain = format!("egress-{}", link.index);
        rules.push(Op::AddChain(Chain::egress(&chain, name)));
        rules.push(Op::AddRule {
            chain: chain.into(),
            rule: Rule::new([
                Statement::Equal(Value::PacketMark, Datum::Mark(MARK)),
                Statement::not_in([Value::PacketMark], RIGHT),
                Statement::drop(),
            ]),
        });
        Ok(Some(Interface { name: name.to_owned(), is_own, mac, arp, solicitations }))
    }
}
