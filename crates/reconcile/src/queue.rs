//! A queue of keys: each key is worked on once at a time, however often it was added, and retried with back-off.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fmt::Display;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// What working on a key came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// Look again after this long, though nothing failed.
    After(Duration),
}

pub struct Queue<K> {
    state: Arc<(Mutex<State<K>>, Notify)>,
}

impl<K> Clone for Queue<K> {
    fn clone(&self) -> Self {
        Queue { state: self.state.clone() }
    }
}

struct State<K> {
    ready: VecDeque<K>,
    queued: HashSet<K>,
    working: HashSet<K>,
    /// Added while being worked on.
    again: HashSet<K>,
    delayed: BTreeMap<(Instant, u64), K>,
    counter: u64,
    failures: HashMap<K, u32>,
}

impl<K: Clone + Eq + Hash> Default for Queue<K> {
    fn default() -> Self {
        let state = State {
            ready: VecDeque::new(),
            queued: HashSet::new(),
            working: HashSet::new(),
            again: HashSet::new(),
            delayed: BTreeMap::new(),
            counter: 0,
            failures: HashMap::new(),
        };
        Queue { state: Arc::new((Mutex::new(state), Notify::new())) }
    }
}

const FIRST_RETRY: Duration = Duration::from_millis(5);
const LAST_RETRY: Duration = Duration::from_secs(30);

impl<K: Clone + Eq + Hash> Queue<K> {
    fn lock(&self) -> std::sync::MutexGuard<'_, State<K>> {
        self.state.0.lock().expect("no holder of the queue's lock panics")
    }

    pub fn add(&self, key: K) {
        let mut state = self.lock();
        if state.working.contains(&key) {
            state.again.insert(key);
        } else if state.queued.insert(key.clone()) {
            state.ready.push_back(key);
        }
        drop(state);
        self.state.1.notify_one();
    }

    pub fn add_after(&self, key: K, delay: Duration) {
        let mut state = self.lock();
        state.counter += 1;
        let at = (Instant::now() + delay, state.counter);
        state.delayed.insert(at, key);
        drop(state);
        self.state.1.notify_one();
    }

    /// The next key, marked as being worked on until `done`.
    pub async fn next(&self) -> K {
        loop {
            let wake = {
                let mut state = self.lock();
                let now = Instant::now();
                while let Some(entry) = state.delayed.first_entry().filter(|e| e.key().0 <= now) {
                    let key = entry.remove();
                    if state.working.contains(&key) {
                        state.again.insert(key);
                    } else if state.queued.insert(key.clone()) {
                        state.ready.push_back(key);
                    }
                }
                if let Some(key) = state.ready.pop_front() {
                    state.queued.remove(&key);
                    state.working.insert(key.clone());
                    if !state.ready.is_empty() {
                        self.state.1.notify_one();
                    }
                    return key;
                }
                state.delayed.first_key_value().map(|(at, _)| at.0)
            };
            match wake {
                Some(at) => {
                    tokio::select! {
                        () = self.state.1.notified() => {}
                        () = tokio::time::sleep_until(at) => {}
                    }
                }
                None => self.state.1.notified().await,
            }
        }
    }

    /// Ends work on a key. A key added meanwhile is queued again.
    pub fn done(&self, key: &K) {
        let mut state = self.lock();
        state.working.remove(key);
        if state.again.remove(key) && state.queued.insert(key.clone()) {
            state.ready.push_back(key.clone());
        }
        drop(state);
        self.state.1.notify_one();
    }

    fn succeeded(&self, key: &K) {
        self.lock().failures.remove(key);
    }

    fn failed(&self, key: &K) -> Duration {
        let mut state = self.lock();
        let count = state.failures.entry(key.clone()).or_insert(0);
        *count += 1;
        (FIRST_RETRY * 2u32.saturating_pow((*count - 1).min(16))).min(LAST_RETRY)
    }
}

/// Works on keys until cancelled, `workers` at a time; a failure is retried after 5 ms, doubling to 30 s.
pub async fn run_queue<K, E, F, W>(
    name: &'static str,
    queue: Queue<K>,
    workers: usize,
    token: CancellationToken,
    work: W,
) where
    K: Clone + Eq + Hash + Display + Send + 'static,
    E: Display + Send,
    F: Future<Output = Result<Outcome, E>> + Send,
    W: Fn(K) -> F + Send + Sync + 'static,
{
    let work = Arc::new(work);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..workers.max(1) {
        let (queue, token, work) = (queue.clone(), token.clone(), work.clone());
        tasks.spawn(async move {
            loop {
                let key = tokio::select! {
                    key = queue.next() => key,
                    () = token.cancelled() => return,
                };
                let result = tokio::select! {
                    result = work(key.clone()) => result,
                    () = token.cancelled() => return,
                };
                match result {
                    Ok(outcome) => {
                        queue.succeeded(&key);
                        if let Outcome::After(delay) = outcome {
                            queue.add_after(key.clone(), delay);
                        }
                    }
                    Err(error) => {
                        let delay = queue.failed(&key);
                        if delay < Duration::from_secs(1) {
                            debug!(controller = name, %key, %error, "will retry");
                        } else {
                            warn!(controller = name, %key, %error, "keeps failing, will retry");
                        }
                        queue.add_after(key.clone(), delay);
                    }
                }
                queue.done(&key);
            }
        });
    }
    while tasks.join_next().await.is_some() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_key_added_twice_is_worked_on_once_and_again_if_added_meanwhile() {
        let queue = Queue::default();
        queue.add("a");
        queue.add("a");
        assert_eq!(queue.next().await, "a");
        queue.add("a");
        assert!(tokio::time::timeout(Duration::from_millis(20), queue.next()).await.is_err());
        queue.done(&"a");
        assert_eq!(queue.next().await, "a");
    }

    #[tokio::test]
    async fn failures_are_retried_until_success() {
        let queue: Queue<String> = Queue::default();
        queue.add("a".into());
        let token = CancellationToken::new();
        let count = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let (seen, end) = (count.clone(), token.clone());
        run_queue("test", queue, 2, token, move |_| {
            let n = seen.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let end = end.clone();
            async move {
                if n < 3 {
                    return Err("not yet");
                }
                end.cancel();
                Ok(Outcome::Done)
            }
        })
        .await;
        assert_eq!(count.load(std::sync::atomic::Ordering::SeqCst), 4);
    }
}
