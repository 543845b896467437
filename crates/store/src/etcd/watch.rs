//! etcd's watch as ours: one batch per revision.

use std::collections::VecDeque;

use futures::StreamExt;
use tonic::Streaming;

use super::client::Client;
use super::messages::{self, EventType, WatchCreateRequest, WatchRequest, WatchResponse};
use super::{Keys, refused, signed, unsigned};
use crate::{Error, EventKind, Revision, WatchBatch, WatchEvent, WatchStream};

struct Watch {
    responses: Streaming<WatchResponse>,
    keys: Keys,
    from: Revision,
    ready: VecDeque<WatchBatch>,
}

pub(super) async fn open(client: &Client, keys: &Keys, prefix: &str, from: Revision) -> Result<WatchStream, Error> {
    let (key, range_end) = keys.range(prefix);
    let start_revision = signed(from.saturating_add(1));
    let create = WatchCreateRequest { key, range_end, start_revision, prev_kv: true };
    let responses = client.watch(WatchRequest { create: Some(create) }).await.map_err(refused)?;
    let watch = Watch { responses, keys: keys.clone(), from, ready: VecDeque::new() };
    let stream = futures::stream::unfold(Some(watch), |watch| async move {
        let mut watch = watch?;
        match watch.next().await {
            Ok(batch) => Some((Ok(batch), Some(watch))),
            Err(error) => Some((Err(error), None)),
        }
    });
    Ok(stream.boxed())
}

impl Watch {
    async fn next(&mut self) -> Result<WatchBatch, Error> {
        loop {
            if let Some(batch) = self.ready.pop_front() {
                return Ok(batch);
            }
            let response = self.responses.message().await.map_err(refused)?;
            let response = response.ok_or_else(|| Error::Unavailable("etcd ended the watch".into()))?;
            if response.compact_revision > 0 {
                return Err(Error::Compacted { requested: self.from });
            }
            if response.canceled {
                return Err(Error::Refused(response.cancel_reason));
            }
            // The first response says `created` and has no events.
            for event in response.events {
                let event = self.read(event)?;
                match self.ready.back_mut().filter(|batch| batch.revision == event.revision) {
                    Some(batch) => batch.events.push(event),
                    None => self.ready.push_back(WatchBatch { revision: event.revision, events: vec![event] }),
                }
            }
        }
    }

    fn read(&self, event: messages::Event) -> Result<WatchEvent, Error> {
        let is_delete = event.r#type() == EventType::Delete;
        let kv = event.kv.ok_or_else(|| Error::Refused("it sent an event without a key".into()))?;
        let revision = unsigned(kv.mod_revision);
        let kv = self.keys.read(kv)?;
        let kind = if is_delete {
            EventKind::Delete
        } else {
            EventKind::Put { value: kv.value, create_revision: kv.create_revision }
        };
        let previous = event.prev_kv.map(|kv| kv.value);
        Ok(WatchEvent { key: kv.key, revision, kind, previous })
    }
}
