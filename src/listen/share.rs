//! Who wants to know the same waits for one answer, and that is always asked for after he came; few are asked for at
//! once, one after the other, and those who ask take turns. Knows nothing of what is asked, and of whom.

use std::collections::HashMap;
use std::hash::Hash;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How many sources' turns are known before those of sources that do not wait are forgotten.
const TURNS: usize = 1024;

/// Questions that are asked in the name of all who wait for the answer.
pub struct Shared<Q, S, A> {
    at_once: usize,
    apart: Duration,
    queue: usize,
    state: Mutex<State<Q, S, A>>,
}

struct State<Q, S, A> {
    /// For whom they are being asked.
    asking: Vec<S>,
    /// None is asked before.
    next: Instant,
    /// Those that are not asked yet, one of a kind, in the order in which they came.
    waiting: Vec<Waiting<Q, S, A>>,
    /// The number of each source's last question among all that were asked.
    turns: HashMap<S, u64>,
    asked: u64,
}

struct Waiting<Q, S, A> {
    question: Q,
    /// Before those that are not.
    first: bool,
    /// Who asked it first; only his places are counted.
    source: S,
    /// One for each who waits.
    who: Vec<(Instant, S)>,
    answer: Arc<Coming<A>>,
}

/// Outlives its question's place in the queue.
struct Coming<A> {
    /// None if there will be none.
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
    /// It was asked, and had not come by the deadline.
    Unanswered,
    /// Who asked it has panicked.
    Broken,
}

impl<Q: PartialEq, S: Copy + Eq + Hash, A: Clone> Shared<Q, S, A> {
    /// At most so many questions at once, of which one source never has all, the beginnings of any two so far apart, and at
    /// most so many of one source that wait besides those that come first.
    pub fn new(at_once: usize, apart: Duration, queue: usize) -> Self {
        let state = State {
            asking: Vec::new(),
            next: Instant::now(),
            waiting: Vec::new(),
            turns: HashMap::new(),
            asked: 0,
        };
        Shared { at_once, apart, queue, state: Mutex::new(state) }
    }

    /// Returns an answer that was asked for after this call began: by `ask`, or by somebody with the same
    /// question. `ask` must come back at the deadline. The next question is of the source that has not had a turn for
    /// longest. Of one source, those that come `first` are asked before the others, and there must not be many of them.
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
                // those who asked the same before come along
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

    /// The place of the question that is next, and in whose turn it is asked.
    fn next(&self, at_once: usize) -> Option<(usize, S)> {
        if self.asking.len() >= at_once {
            return None;
        }
        // the last place at Patroni is for whoever has none
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

    /// Whether this question is next, and to be asked by whoever has this deadline: the last one, so that the others
    /// have all their time.
    fn is_next(&self, coming: &Arc<Coming<A>>, deadline: Instant, at_once: usize) -> bool {
        let next = self.next(at_once).map(|(place, _)| &self.waiting[place]);
        next.is_some_and(|next| {
            let last = next.who.iter().map(|(deadline, _)| *deadline).max();
            Arc::ptr_eq(&next.answer, coming) && last == Some(deadline)
        })
    }

    /// It is being asked from here on, in the name of all who wait for it.
    fn begin(&mut self, coming: &Arc<Coming<A>>, at_once: usize) -> Option<S> {
        let (place, source) = self.next(at_once)?;
        debug_assert!(Arc::ptr_eq(&self.waiting[place].answer, coming));
        self.asked += 1;
        if self.turns.len() >= TURNS {
            let waiting: Vec<_> = self.waiting.iter().flat_map(|other| &other.who).collect();
            self.turns.retain(|source, _| waiting.iter().any(|(_, other)| other == source));
        }
        self.turns.insert(source, self.asked);
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
