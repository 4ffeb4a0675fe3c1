//! Shared questions: callers with the same question share one answer. Hand-written, since crates for this let a caller join
//! a call in flight, whose answer is older than the caller's question. Knows nothing of Patroni and HAProxy.

use std::collections::HashMap;
use std::hash::Hash;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How many sources' turns the queue remembers before it forgets those of sources that do not wait.
const MOST_TURNS: usize = 1024;

/// A queue of questions, each of which is asked for all callers who wait for its answer.
pub struct Shared<Q, S, A>(Mutex<State<Q, S, A>>);

struct State<Q, S, A> {
    at_once: usize,
    apart: Duration,
    queue: usize,
    /// The sources whose questions are in flight.
    asking: Vec<S>,
    /// When the next question may begin.
    next: Instant,
    /// The questions that have not begun, each once, in the order in which they came.
    waiting: Vec<Waiting<Q, S, A>>,
    /// For each source, the number of the last question that began in its turn.
    turns: HashMap<S, u64>,
    begun: u64,
}

struct Waiting<Q, S, A> {
    question: Q,
    /// Whether it comes before the questions that are not `first`.
    first: bool,
    /// The source of the first caller. Only its queue counts the question.
    source: S,
    /// The deadline and the source of each caller.
    callers: Vec<(Instant, S)>,
    answer: Arc<Coming<A>>,
}

/// An answer for which callers wait, even after its question has left the queue.
struct Coming<A> {
    /// None inside if the caller who asked has panicked.
    answer: OnceLock<Option<A>>,
    changed: Condvar,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missed {
    /// The question had no turn before the deadline.
    NoTurn,
    /// Too many other questions of the same source wait.
    QueueFull,
    /// The question was asked, and no answer came before the deadline.
    NoAnswer,
    /// The caller who asked has panicked.
    Panicked,
}

impl<Q: PartialEq, S: Copy + Eq + Hash, A: Clone> Shared<Q, S, A> {
    /// Makes a queue. At most `at_once` questions are in flight, of which one source never has all. They begin at least
    /// `apart` from each other. At most `queue` questions of one source wait, not counting those that come first.
    pub fn new(at_once: usize, apart: Duration, queue: usize) -> Self {
        let (asking, next, waiting) = (Vec::new(), Instant::now(), Vec::new());
        let (turns, begun) = (HashMap::new(), 0);
        Shared(Mutex::new(State { at_once, apart, queue, asking, next, waiting, turns, begun }))
    }

    /// Returns an answer that was requested after this call began, by `ask` or by another caller with the same question.
    /// `ask` must return by the deadline. Next comes the source whose last turn is longest ago. Its `first` questions come
    /// before the others and must be few. If `ask` panics, so does this call.
    pub fn ask(
        &self,
        question: Q,
        source: S,
        first: bool,
        deadline: Instant,
        ask: impl FnOnce() -> A,
    ) -> Result<A, Missed> {
        let mut state = self.lock();
        let caller = (deadline, source);
        let coming = state.join(question, caller, first).ok_or(Missed::QueueFull)?;
        // this caller's source may make a waiting question the next one, which a caller with a later deadline asks
        state.wake_next();
        loop {
            if let Some(answer) = coming.answer.get() {
                return answer.clone().ok_or(Missed::Panicked);
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(state.leave(&coming, caller));
            }
            let mine = state.is_next(&coming, deadline);
            if mine && now >= state.next {
                break;
            }
            let until = if mine { state.next.min(deadline) } else { deadline };
            let wait = coming.changed.wait_timeout(state, until - now);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        let turn = state.begin_question(&coming);
        state.next = Instant::now() + state.apart;
        state.wake_next();
        drop(state);
        let answer = panic::catch_unwind(AssertUnwindSafe(ask));
        let mut state = self.lock();
        state.end_question(turn);
        state.wake_next();
        let _ = coming.answer.set(answer.as_ref().ok().cloned());
        coming.changed.notify_all();
        drop(state);
        answer.map_err(|panic| panic::resume_unwind(panic))
    }

    /// Counts the callers whose question has not begun.
    pub fn count_waiting(&self) -> usize {
        self.lock().waiting.iter().map(|other| other.callers.len()).sum()
    }

    fn lock(&self) -> MutexGuard<'_, State<Q, S, A>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<Q: PartialEq, S: Copy + Eq + Hash, A> State<Q, S, A> {
    fn join(&mut self, question: Q, caller: (Instant, S), first: bool) -> Option<Arc<Coming<A>>> {
        if let Some(place) = self.waiting.iter().position(|other| other.question == question) {
            let same = &mut self.waiting[place];
            same.callers.push(caller);
            let answer = same.answer.clone();
            if first && !same.first {
                // the callers who already wait for the same answer come along
                same.first = true;
                self.waiting[place..].rotate_left(1);
            }
            return Some(answer);
        }
        let source = caller.1;
        let own = self.waiting.iter().filter(|other| !other.first && other.source == source);
        if !first && own.count() >= self.queue {
            return None;
        }
        let answer = Arc::new(Coming { answer: OnceLock::new(), changed: Condvar::new() });
        let callers = vec![caller];
        self.waiting.push(Waiting { question, first, source, callers, answer: answer.clone() });
        Some(answer)
    }

    /// Finds the place of the next question, and the source whose turn it is.
    fn next_question(&self) -> Option<(usize, S)> {
        if self.asking.len() >= self.at_once {
            return None;
        }
        // the last slot is for a source that has no question in flight
        let may = |source: &S| {
            let own = self.asking.iter().filter(|other| *other == source).count();
            own == 0 || own + 1 < self.at_once
        };
        let turn = |source: S| self.turns.get(&source).copied().unwrap_or(0);
        let questions = self.waiting.iter().enumerate();
        let turns = questions.flat_map(|(place, other)| {
            other.callers.iter().map(move |(_, source)| (*source, !other.first, place))
        });
        let turns = turns.filter(|(source, ..)| may(source));
        let next = turns.min_by_key(|(source, late, place)| (turn(*source), *late, *place));
        next.map(|(source, _, place)| (place, source))
    }

    /// Whether this question is next and the caller with this deadline asks it. The caller with the latest deadline asks,
    /// so that no other caller gets less time than its own.
    fn is_next(&self, coming: &Arc<Coming<A>>, deadline: Instant) -> bool {
        let next = self.next_question().map(|(place, _)| &self.waiting[place]);
        next.is_some_and(|next| {
            let last = next.callers.iter().map(|(deadline, _)| *deadline).max();
            Arc::ptr_eq(&next.answer, coming) && last == Some(deadline)
        })
    }

    /// Takes the question out of the queue, so that no other caller joins it.
    fn begin_question(&mut self, coming: &Arc<Coming<A>>) -> Option<S> {
        let (place, source) = self.next_question()?;
        debug_assert!(Arc::ptr_eq(&self.waiting[place].answer, coming));
        self.begun += 1;
        if self.turns.len() >= MOST_TURNS {
            let waiting: Vec<_> = self.waiting.iter().flat_map(|other| &other.callers).collect();
            self.turns.retain(|source, _| waiting.iter().any(|(_, other)| other == source));
        }
        self.turns.insert(source, self.begun);
        self.waiting.remove(place);
        self.asking.push(source);
        Some(source)
    }

    fn end_question(&mut self, turn: Option<S>) {
        let place = self.asking.iter().position(|source| Some(*source) == turn);
        place.map(|place| self.asking.swap_remove(place));
    }

    fn leave(&mut self, coming: &Arc<Coming<A>>, caller: (Instant, S)) -> Missed {
        let place = self.waiting.iter().position(|other| Arc::ptr_eq(&other.answer, coming));
        let Some(place) = place else { return Missed::NoAnswer };
        let waiting = &mut self.waiting[place].callers;
        if let Some(own) = waiting.iter().position(|other| *other == caller) {
            waiting.swap_remove(own);
        }
        if waiting.is_empty() {
            self.waiting.remove(place);
        }
        self.wake_next();
        Missed::NoTurn
    }

    fn wake_next(&self) {
        if let Some((place, _)) = self.next_question() {
            self.waiting[place].answer.changed.notify_all();
        }
    }
}
