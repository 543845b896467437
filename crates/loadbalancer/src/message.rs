//! What announcing nodes tell each other, in one UDP packet. Numbers are big-endian.

const MAGIC: [u8; 4] = *b"FLB1";
/// Addresses that not every node may announce are compared in so many parts.
pub const BUCKETS: usize = 32;
/// Sets that bind a voter; there are rarely more than two.
const MOST_SETS: usize = 16;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// Which cluster's: others on the same network are not listened to.
    pub cluster: u64,
    pub from: String,
    pub incarnation: u64,
    pub sequence: u64,
    /// The last one heard of the receiver, and of which of its starts.
    pub echo_incarnation: u64,
    pub echo: u64,
    /// It answers another one and is not answered.
    pub is_answer: bool,
    /// A majority answers it.
    pub is_in_contact: bool,
    pub is_leaving: bool,
    pub has_tie: bool,
    /// Digests of its list of members, and of who may announce what.
    pub members: u64,
    pub buckets: [u64; BUCKETS],
    /// Whom it votes for: bits in order of the members' names. The first is what it thinks now, the others still bind it.
    pub sets: Vec<u128>,
    /// Those of the others' members that hold no ballot of it any more.
    pub released: u128,
}

impl Heartbeat {
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for number in [self.cluster, self.incarnation, self.sequence, self.echo_incarnation, self.echo, self.members] {
            bytes.extend(number.to_be_bytes());
        }
        let flags = [self.is_answer, self.is_in_contact, self.is_leaving, self.has_tie];
        bytes.push(flags.iter().enumerate().map(|(bit, flag)| u8::from(*flag) << bit).sum());
        self.buckets.iter().for_each(|bucket| bytes.extend(bucket.to_be_bytes()));
        bytes.extend(self.released.to_be_bytes());
        // More sets than this would be more changes of mind in a lease than there are heartbeats in it: no ballot then.
        let sets = if self.sets.len() > MOST_SETS { &[] } else { self.sets.as_slice() };
        bytes.push(sets.len() as u8);
        sets.iter().for_each(|set| bytes.extend(set.to_be_bytes()));
        bytes.push(self.from.len().min(255) as u8);
        bytes.extend(self.from.bytes().take(255));
        bytes
    }

    /// `None`: it is none of ours.
    pub fn decode(bytes: &[u8]) -> Option<Heartbeat> {
        let mut rest = bytes.strip_prefix(&MAGIC)?;
        let mut number = || -> Option<u64> {
            let (head, tail) = rest.split_first_chunk()?;
            rest = tail;
            Some(u64::from_be_bytes(*head))
        };
        let numbers = [number()?, number()?, number()?, number()?, number()?, number()?];
        let (flags, tail) = rest.split_first()?;
        rest = tail;
        let mut buckets = [0; BUCKETS];
        for bucket in &mut buckets {
            let (head, tail) = rest.split_first_chunk()?;
            rest = tail;
            *bucket = u64::from_be_bytes(*head);
        }
        let wide = |rest: &mut &[u8]| -> Option<u128> {
            let (head, tail) = rest.split_first_chunk()?;
            *rest = tail;
            Some(u128::from_be_bytes(*head))
        };
        let released = wide(&mut rest)?;
        let (count, tail) = rest.split_first()?;
        rest = tail;
        if usize::from(*count) > MOST_SETS {
            return None;
        }
        let sets = (0..*count).map(|_| wide(&mut rest)).collect::<Option<_>>()?;
        let (length, name) = rest.split_first()?;
        if name.len() != usize::from(*length) {
            return None;
        }
        let [cluster, incarnation, sequence, echo_incarnation, echo, members] = numbers;
        Some(Heartbeat {
            cluster,
            from: String::from_utf8(name.to_vec()).ok()?,
            incarnation,
            sequence,
            echo_incarnation,
            echo,
            is_answer: flags & 1 != 0,
            is_in_contact: flags & 2 != 0,
            is_leaving: flags & 4 != 0,
            has_tie: flags & 8 != 0,
            members,
            buckets,
            sets,
            released,
        })
    }
}
