//! Who wants to know the same waits for one answer, and that is always asked for after he came; few are asked for at
//! once, one after the other. Knows nothing of what is asked, and of whom.

use std::collections::VecDeque;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Questions that are asked in the name of all who wait for the answer.
pub struct Shared<Q, A> {
    at_once: usize,
    apart: Duration,
    queue: usize,
    state: Mutex<State<Q, A>>,
}

struct State<Q, A> {
    /// How many are being asked.
    asking: usize,
    /// None is asked before.
    next: Instant,
    /// Those that are not asked yet, one of a kind, in the order in which they came.
    waiting: VecDeque<Waiting<Q, A>>,
}

struct Waiting<Q, A> {
    question: Q,
    /// Before those that are not.
    first: bool,
    /// One for each who waits.
    deadlines: Vec<Instant>,
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
    /// Too many other questions wait.
    Crowded,
    /// It was asked, and had not come by the deadline.
    Unanswered,
    /// Who asked it has panicked.
    Broken,
}

impl<Q: PartialEq, A: Clone> Shared<Q, A> {
    /// At most so many questions at once, the beginnings of any two so far apart, and at most so many that wait besides
    /// those that come first.
    pub fn new(at_once: usize, apart: Duration, queue: usize) -> Self {
        let state = State { asking: 0, next: Instant::now(), waiting: VecDeque::new() };
        Shared { at_once, apart, queue, state: Mutex::new(state) }
    }

    /// Returns an answer that was asked for after this call began: by `ask`, or by somebody with the same
    /// question. `ask` must come back at the deadline. Questions that come `first` are asked before those that do not, and
    /// there must not be many of them.
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
        first: bool,
        deadline: Instant,
        ask: impl FnOnce() -> A,
    ) -> Result<A, Missed> {
        let mut state = self.lock();
        let coming = state.join(question, first, deadline, self.queue).ok_or(Missed::Crowded)?;
        loop {
            if let Some(answer) = coming.answer.get() {
                return answer.clone().ok_or(Missed::Broken);
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(state.leave(&coming, deadline));
            }
            let mine = state.asking < self.at_once && state.is_next(&coming, deadline);
            if mine && now >= state.next {
                break;
            }
            let until = if mine { state.next.min(deadline) } else { deadline };
            let wait = coming.changed.wait_timeout(state, until - now);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.waiting.pop_front();
        state.asking += 1;
        state.next = Instant::now() + self.apart;
        state.wake();
        drop(state);
        let answer = panic::catch_unwind(AssertUnwindSafe(ask));
        let mut state = self.lock();
        state.asking -= 1;
        state.wake();
        let _ = coming.answer.set(answer.as_ref().ok().cloned());
        coming.changed.notify_all();
        drop(state);
        answer.map_err(|panic| panic::resume_unwind(panic))
    }

    /// How many wait for a question that is not asked yet.
    pub fn waiting(&self) -> usize {
        self.lock().waiting.iter().map(|other| other.deadlines.len()).sum()
    }

    fn lock(&self) -> MutexGuard<'_, State<Q, A>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<Q: PartialEq, A> State<Q, A> {
    fn join(
        &mut self,
        question: Q,
        first: bool,
        deadline: Instant,
        queue: usize,
    ) -> Option<Arc<Coming<A>>> {
        let before = self.waiting.iter().filter(|other| other.first).count();
        if let Some(place) = self.waiting.iter().position(|other| other.question == question) {
            let same = &mut self.waiting[place];
            same.deadlines.push(deadline);
            let answer = same.answer.clone();
            if first && !same.first {
                // those who asked the same before come along
                same.first = true;
                self.waiting.make_contiguous()[before..=place].rotate_right(1);
                self.wake();
            }
            return Some(answer);
        }
        if !first && self.waiting.len() - before >= queue {
            return None;
        }
        let answer = Arc::new(Coming { answer: OnceLock::new(), changed: Condvar::new() });
        let deadlines = vec![deadline];
        let place = if first { before } else { self.waiting.len() };
        let waiting = Waiting { question, first, deadlines, answer: answer.clone() };
        self.waiting.insert(place, waiting);
        Some(answer)
    }

    /// Whether this question is next, and to be asked by whoever has this deadline: the last one, so that the others
    /// have all their time.
    fn is_next(&self, coming: &Arc<Coming<A>>, deadline: Instant) -> bool {
        let first = self.waiting.front().filter(|first| Arc::ptr_eq(&first.answer, coming));
        first.is_some_and(|first| first.deadlines.iter().max() == Some(&deadline))
    }

    fn leave(&mut self, coming: &Arc<Coming<A>>, deadline: Instant) -> Missed {
        let place = self.waiting.iter().position(|other| Arc::ptr_eq(&other.answer, coming));
        let Some(place) = place else { return Missed::Unanswered };
        let deadlines = &mut self.waiting[place].deadlines;
        if let Some(own) = deadlines.iter().position(|other| *other == deadline) {
            deadlines.swap_remove(own);
        }
        if deadlines.is_empty() {
            self.waiting.remove(place);
        }
        self.wake();
        Missed::Unasked
    }

    fn wake(&self) {
        if let Some(first) = self.waiting.front() {
            first.answer.changed.notify_all();
        }
    }
}
