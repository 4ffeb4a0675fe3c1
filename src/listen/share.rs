//! Shared questions: those who ask the same wait for one answer. Hand-written, since crates for this join a call in flight,
//! whose answer is older than the question. Knows nothing of Patroni and HAProxy.

use std::collections::HashMap;
use std::hash::Hash;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How many sources' turns are remembered before those of sources that do not wait are forgotten.
const TURNS: usize = 1024;

/// Questions that are asked in the name of all who wait for the answer.
pub struct Shared<Q, S, A> {
    at_once: usize,
    apart: Duration,
    queue: usize,
    state: Mutex<State<Q, S, A>>,
}

struct State<Q, S, A> {
    /// The sources for which questions are being asked.
    asking: Vec<S>,
    /// When the next question may be asked.
    next: Instant,
    /// The questions that are not asked yet, each once, in the order in which they came.
    waiting: Vec<Waiting<Q, S, A>>,
    /// Each source's last question, by its number among all.
    turns: HashMap<S, u64>,
    begun: u64,
}

struct Waiting<Q, S, A> {
    question: Q,
    /// It is asked before those that are not.
    first: bool,
    /// The source that came first, which alone it is counted for.
    source: S,
    /// The deadline and the source of each who waits.
    who: Vec<(Instant, S)>,
    answer: Arc<Coming<A>>,
}

/// An answer that is to come. It outlives its question's place in the queue.
struct Coming<A> {
    /// None if the one who asked has panicked.
    answer: OnceLock<Option<A>>,
    changed: Condvar,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missed {
    /// Others were being asked until the deadline.
    Unasked,
    /// Too many other questions of the same source wait.
    Crowded,
    /// It was asked, and no answer came by the deadline.
    Unanswered,
    /// The one who asked has panicked.
    Broken,
}

impl<Q: PartialEq, S: Copy + Eq + Hash, A: Clone> Shared<Q, S, A> {
    /// At most `at_once` questions, of which one source never has all, which begin `apart` from each other. A `queue` is as
    /// long as the waiting questions of one source besides those that come first.
    pub fn new(at_once: usize, apart: Duration, queue: usize) -> Self {
        let state = State {
            asking: Vec::new(),
            next: Instant::now(),
            waiting: Vec::new(),
            turns: HashMap::new(),
            begun: 0,
        };
        Shared { at_once, apart, queue, state: Mutex::new(state) }
    }

    /// Returns an answer that was asked for after this call began, by `ask` or by somebody with the same question. `ask`
    /// must return at the deadline. The next question is that of the source whose last turn is longest ago, and among those
    /// of one source one that comes `first`, of which there must not be many.
    ///
    /// # Errors
    ///
    /// See [`Missed`]; never much later than the deadline.
    ///
    /// # Panics
    ///
    /// If `ask` does. The others are told.
    pub fn ask(
        &self,
        question: Q,
        source: S,
        first: bool,
        deadline: Instant,
        ask: impl FnOnce() -> A,
    ) -> Result<A, Missed> {
        let mut state = self.lock();
        let who = (deadline, source);
        let coming = state.join(question, who, first, self.queue).ok_or(Missed::Crowded)?;
        loop {
            if let Some(answer) = coming.answer.get() {
                return answer.clone().ok_or(Missed::Broken);
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(state.leave(&coming, who, self.at_once));
            }
            let mine = state.is_next(&coming, deadline, self.at_once);
            if mine && now >= state.next {
                break;
            }
            let until = if mine { state.next.min(deadline) } else { deadline };
            let wait = coming.changed.wait_timeout(state, until - now);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        let turn = state.begin(&coming, self.at_once);
        state.next = Instant::now() + self.apart;
        state.wake(self.at_once);
        drop(state);
        let answer = panic::catch_unwind(AssertUnwindSafe(ask));
        let mut state = self.lock();
        state.end(turn);
        state.wake(self.at_once);
        let _ = coming.answer.set(answer.as_ref().ok().cloned());
        coming.changed.notify_all();
        drop(state);
        answer.map_err(|panic| panic::resume_unwind(panic))
    }

    /// How many wait for a question that is not asked yet.
    pub fn waiting(&self) -> usize {
        self.lock().waiting.iter().map(|other| other.who.len()).sum()
    }

    fn lock(&self) -> MutexGuard<'_, State<Q, S, A>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<Q: PartialEq, S: Copy + Eq + Hash, A> State<Q, S, A> {
    fn join(
        &mut self,
        question: Q,
        who: (Instant, S),
        first: bool,
        queue: usize,
    ) -> Option<Arc<Coming<A>>> {
        if let Some(place) = self.waiting.iter().position(|other| other.question == question) {
            let same = &mut self.waiting[place];
            same.who.push(who);
            let answer = same.answer.clone();
            if first && !same.first {
                // those who already wait for the same come along
                same.first = true;
                self.waiting[place..].rotate_left(1);
            }
            return Some(answer);
        }
        let source = who.1;
        let own = self.waiting.iter().filter(|other| !other.first && other.source == source);
        if !first && own.count() >= queue {
            return None;
        }
        let answer = Arc::new(Coming { answer: OnceLock::new(), changed: Condvar::new() });
        let who = vec![who];
        self.waiting.push(Waiting { question, first, source, who, answer: answer.clone() });
        Some(answer)
    }

    /// The place of the next question, and the source whose turn it is.
    fn next(&self, at_once: usize) -> Option<(usize, S)> {
        if self.asking.len() >= at_once {
            return None;
        }
        // the last place is for a source that has none
        let may = |source: &S| {
            let own = self.asking.iter().filter(|other| *other == source).count();
            own == 0 || own + 1 < at_once
        };
        let turn = |source: S| self.turns.get(&source).copied().unwrap_or(0);
        let questions = self.waiting.iter().enumerate();
        let turns = questions.flat_map(|(place, other)| {
            other.who.iter().map(move |(_, source)| (*source, !other.first, place))
        });
        let turns = turns.filter(|(source, ..)| may(source));
        let next = turns.min_by_key(|(source, late, place)| (turn(*source), *late, *place));
        next.map(|(source, _, place)| (place, source))
    }

    /// Whether this question is next, and asked by the caller with this deadline: the last one, so that the others have all
    /// their time.
    fn is_next(&self, coming: &Arc<Coming<A>>, deadline: Instant, at_once: usize) -> bool {
        let next = self.next(at_once).map(|(place, _)| &self.waiting[place]);
        next.is_some_and(|next| {
            let last = next.who.iter().map(|(deadline, _)| *deadline).max();
            Arc::ptr_eq(&next.answer, coming) && last == Some(deadline)
        })
    }

    /// From here on it is asked for all who wait.
    fn begin(&mut self, coming: &Arc<Coming<A>>, at_once: usize) -> Option<S> {
        let (place, source) = self.next(at_once)?;
        debug_assert!(Arc::ptr_eq(&self.waiting[place].answer, coming));
        self.begun += 1;
        if self.turns.len() >= TURNS {
            let waiting: Vec<_> = self.waiting.iter().flat_map(|other| &other.who).collect();
            self.turns.retain(|source, _| waiting.iter().any(|(_, other)| other == source));
        }
        self.turns.insert(source, self.begun);
        self.waiting.remove(place);
        self.asking.push(source);
        Some(source)
    }

    fn end(&mut self, turn: Option<S>) {
        let place = self.asking.iter().position(|source| Some(*source) == turn);
        place.map(|place| self.asking.swap_remove(place));
    }

    fn leave(&mut self, coming: &Arc<Coming<A>>, who: (Instant, S), at_once: usize) -> Missed {
        let place = self.waiting.iter().position(|other| Arc::ptr_eq(&other.answer, coming));
        let Some(place) = place else { return Missed::Unanswered };
        let waiting = &mut self.waiting[place].who;
        if let Some(own) = waiting.iter().position(|other| *other == who) {
            waiting.swap_remove(own);
        }
        if waiting.is_empty() {
            self.waiting.remove(place);
        }
        self.wake(at_once);
        Missed::Unasked
    }

    fn wake(&self, at_once: usize) {
        if let Some((place, _)) = self.next(at_once) {
            self.waiting[place].answer.changed.notify_all();
        }
    }
}
