//! One virtual router as a state machine (RFC 9568, section 6): advertisements and times in, what to do out. No clock, no I/O.

use std::net::IpAddr;
use std::time::Duration;

/// The priority of who owns the addresses for good.
const OWNER: u8 = 255;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// 1 to 255.
    pub priority: u8,
    pub interval: Duration,
    /// Whether it takes over from one of a lower priority.
    pub preempts: bool,
    /// For so long after it began it does not.
    pub preempt_delay: Duration,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// An advertisement with this priority.
    Advertise(u8),
    /// The addresses are ours from now on.
    Take,
    /// They are not any more.
    GiveUp,
    /// Somebody else took them for its own: everybody is to hear again where they are.
    TellAgain,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Initialize,
    Backup,
    Active,
}

#[derive(Clone, Debug)]
pub struct Machine {
    settings: Settings,
    /// Our address on the network: of two with one priority, that with the greater one wins.
    primary: IpAddr,
    state: State,
    /// Between advertisements of who is active.
    active_interval: Duration,
    /// When we speak as the active one, or take over as a backup.
    timer: Option<Duration>,
    /// From when on it may preempt.
    preempts_at: Duration,
}

impl Machine {
    pub fn new(settings: Settings, primary: IpAddr) -> Machine {
        Machine {
            active_interval: settings.interval,
            settings,
            primary,
            state: State::Initialize,
            timer: None,
            preempts_at: Duration::ZERO,
        }
    }

    pub fn state(&self) -> State {
        self.state
    }

    /// When something is due by itself.
    pub fn next(&self) -> Option<Duration> {
        self.timer
    }

    /// How long the active one may be silent before a backup of our priority takes over.
    pub fn down_interval(&self) -> Duration {
        self.active_interval * 3 + self.skew()
    }

    fn skew(&self) -> Duration {
        self.active_interval * (256 - u32::from(self.settings.priority)) / 256
    }

    pub fn start(&mut self, now: Duration) -> Vec<Action> {
        if self.state != State::Initialize {
            return Vec::new();
        }
        self.active_interval = self.settings.interval;
        self.preempts_at = now + self.settings.preempt_delay;
        if self.settings.priority == OWNER {
            return self.take(now);
        }
        self.state = State::Backup;
        self.timer = Some(now + self.down_interval());
        Vec::new()
    }

    /// Gives up, and tells so that the next one need not wait.
    pub fn stop(&mut self) -> Vec<Action> {
        self.timer = None;
        match std::mem::replace(&mut self.state, State::Initialize) {
            // Others speak as soon as they hear it: we are silent by then.
            State::Active => vec![Action::GiveUp, Action::Advertise(0)],
            _ => Vec::new(),
        }
    }

    /// Another priority, as health checks say.
    pub fn set_priority(&mut self, priority: u8, now: Duration) -> Vec<Action> {
        if priority == self.settings.priority {
            return Vec::new();
        }
        self.settings.priority = priority;
        match self.state {
            State::Initialize => Vec::new(),
            State::Backup => {
                self.timer = Some(now + self.down_interval());
                Vec::new()
            }
            State::Active => {
                self.timer = Some(now + self.settings.interval);
                vec![Action::Advertise(priority)]
            }
        }
    }

    /// What is due.
    pub fn tick(&mut self, now: Duration) -> Vec<Action> {
        if self.timer.is_none_or(|at| at > now) {
            return Vec::new();
        }
        match self.state {
            State::Initialize => Vec::new(),
            State::Backup => self.take(now),
            State::Active => {
                self.timer = Some(now + self.settings.interval);
                vec![Action::Advertise(self.settings.priority)]
            }
        }
    }

    /// An advertisement of another.
    pub fn receive(&mut self, priority: u8, interval: Duration, from: IpAddr, now: Duration) -> Vec<Action> {
        match self.state {
            State::Initialize => Vec::new(),
            State::Backup if priority == 0 => {
                self.timer = Some(now + self.skew());
                Vec::new()
            }
            State::Backup => {
                let preempts = self.settings.preempts && now >= self.preempts_at;
                if priority >= self.settings.priority || !preempts {
                    self.active_interval = interval;
                    self.timer = Some(now + self.down_interval());
                }
                Vec::new()
            }
            State::Active if priority == 0 => {
                self.timer = Some(now + self.settings.interval);
                vec![Action::Advertise(self.settings.priority)]
            }
            State::Active => {
                let own = self.settings.priority;
                if priority > own || (priority == own && from > self.primary) {
                    self.state = State::Backup;
                    self.active_interval = interval;
                    self.timer = Some(now + self.down_interval());
                    // The other hears that somebody spoke beside it, and tells everybody again where the addresses are.
                    return vec![Action::GiveUp, Action::Advertise(own)];
                }
                // So that the other hears at once that it is not needed.
                self.timer = Some(now + self.settings.interval);
                vec![Action::Advertise(own), Action::TellAgain]
            }
        }
    }

    fn take(&mut self, now: Duration) -> Vec<Action> {
        self.state = State::Active;
        self.active_interval = self.settings.interval;
        self.timer = Some(now + self.settings.interval);
        // The one before us, if it is there, is silent before we speak.
        vec![Action::Advertise(self.settings.priority), Action::Take]
    }
}
