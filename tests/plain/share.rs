//! Shared questions: no answer is older than its question, few questions are in flight, and each caller has an answer or an
//! error by its deadline. One test has random threads, and the others one case each.

use patroni_agent_check::listen::share::{Missed, Shared};
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Scope, scope, sleep};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const NO_PAUSE: Duration = Duration::ZERO;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Keeps a question in flight until the test lets it end.
fn keep_in_flight(began: &Sender<()>, go: &Receiver<()>) {
    began.send(()).expect("the test");
    go.recv_timeout(Duration::from_secs(20)).expect("the test");
}

/// Asks a question in a thread, and returns when it is in flight. It ends when the test sends.
fn ask_in_flight<'s, Q: PartialEq + Send + 's>(
    scope: &'s Scope<'s, '_>,
    shared: &'s Shared<Q, u8, ()>,
    question: Q,
    first: bool,
) -> Sender<()> {
    let ((began, has_begun), (let_go, go)) = (channel(), channel());
    scope.spawn(move || shared.ask(question, 1, first, soon(), || keep_in_flight(&began, &go)));
    has_begun.recv().expect("it is asked");
    let_go
}

/// A small generator of pseudo-random numbers (xorshift).
fn chance(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

#[test]
fn every_caller_gets_a_fresh_answer_or_an_error_in_time() {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("a date");
    let seed = since.as_nanos() as u64;
    println!("seed {seed}");
    const AT_ONCE: usize = 3;
    const APART: Duration = Duration::from_micros(300);
    let shared = Shared::new(AT_ONCE, APART, 64);
    // the number of events so far
    let clock = AtomicU64::new(1);
    let (asking, asked, shares) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let started = Instant::now();
    scope(|scope| {
        for thread in 1..=48 {
            let (shared, clock, asking, asked, shares) =
                (&shared, &clock, &asking, &asked, &shares);
            let mut seed = (seed ^ thread << 32) | 1;
            scope.spawn(move || {
                for _ in 0..40 {
                    let question = chance(&mut seed) % 4;
                    let took = Duration::from_micros(chance(&mut seed) % 500);
                    let came = clock.fetch_add(1, Ordering::SeqCst);
                    let mut own = false;
                    let answer = shared.ask(question, thread % 4, false, soon(), || {
                        own = true;
                        asked.fetch_add(1, Ordering::SeqCst);
                        let at_once = asking.fetch_add(1, Ordering::SeqCst) + 1;
                        assert!(at_once <= AT_ONCE, "{at_once} at once");
                        let now = clock.fetch_add(1, Ordering::SeqCst);
                        sleep(took);
                        asking.fetch_sub(1, Ordering::SeqCst);
                        (question, now)
                    });
                    let (to, when) = answer.expect("time enough");
                    assert_eq!(to, question);
                    assert!(when > came, "asked at {when}, before {came}");
                    shares.fetch_add(usize::from(!own), Ordering::SeqCst);
                    sleep(Duration::from_micros(chance(&mut seed) % 300));
                }
            });
        }
    });
    let (asked, shares) = (asked.into_inner(), shares.into_inner());
    println!("{asked} asked, {shares} shared, in {:?}", started.elapsed());
    assert_eq!(asked + shares, 48 * 40);
    assert!(shares > asked, "48 callers of four questions share them");
    assert!(started.elapsed() >= APART * (asked as u32 - 1), "one after the other");
}

/// A caller who comes while the same question is in flight must not get its answer, and need not wait for it.
#[test]
fn no_caller_joins_a_question_in_flight() {
    let shared = Shared::new(2, NO_PAUSE, 64);
    let ((began, has_begun), (let_go, go)) = (channel(), channel());
    scope(|scope| {
        let first = scope.spawn(|| {
            let go = go;
            shared.ask("x", 1, false, soon(), || {
                keep_in_flight(&began, &go);
                "first"
            })
        });
        has_begun.recv().expect("the first");
        assert_eq!(shared.ask("x", 2, false, soon(), || "second"), Ok("second"));
        let_go.send(()).expect("the first");
        assert_eq!(first.join().expect("no panic"), Ok("first"));
    });
}

/// Each caller leaves at its own deadline, and the others keep the question's place in the queue.
#[test]
fn no_caller_waits_beyond_its_deadline() {
    let shared = Shared::new(1, NO_PAUSE, 64);
    let ((began, has_begun), (let_go, go)) = (channel(), channel());
    scope(|scope| {
        let shared = &shared;
        let hung =
            scope.spawn(move || shared.ask("x", 1, false, soon(), || keep_in_flight(&began, &go)));
        has_begun.recv().expect("the first");
        let stays = scope.spawn(|| shared.ask("y", 1, false, soon(), || ()));
        let in_time = Instant::now() + Duration::from_millis(100);
        let others: Vec<_> = ["x", "y", "y", "z"]
            .map(|question| scope.spawn(move || shared.ask(question, 1, false, in_time, || ())))
            .into();
        for other in others {
            assert_eq!(other.join().expect("no panic"), Err(Missed::NoTurn));
        }
        let now = Instant::now();
        assert!(now >= in_time && now < in_time + Duration::from_secs(5), "at its deadline");
        // no caller is left who would ask x or z
        let_go.send(()).expect("the first");
        assert_eq!(stays.join().expect("no panic"), Ok(()));
        assert_eq!(hung.join().expect("no panic"), Ok(()));
        assert_eq!(shared.ask("z", 1, false, soon(), || ()), Ok(()));
    });
}

/// The caller with the last deadline asks, and the others do not wait beyond their own deadlines.
#[test]
fn the_caller_with_the_last_deadline_asks() {
    let shared = Shared::new(1, NO_PAUSE, 64);
    let ((asks, is_asked), (answer, answered)) = (channel(), channel());
    scope(|scope| {
        let shared = &shared;
        let let_go = ask_in_flight(scope, shared, "x", false);
        let late = Instant::now() + Duration::from_secs(2);
        let early =
            scope.spawn(move || shared.ask("y", 1, false, late, || panic!("it is not the last")));
        let last = scope
            .spawn(move || shared.ask("y", 1, false, soon(), || keep_in_flight(&asks, &answered)));
        while shared.count_waiting() < 2 {
            std::thread::yield_now();
        }
        let_go.send(()).expect("the first");
        is_asked.recv().expect("the last");
        assert_eq!(early.join().expect("no panic"), Err(Missed::NoAnswer));
        answer.send(()).expect("the last");
        assert_eq!(last.join().expect("no panic"), Ok(()));
    });
}

/// After a panic, the other callers get an error, and other questions go on.
#[test]
fn a_panic_wakes_the_other_callers() {
    let shared = &Shared::new(1, NO_PAUSE, 64);
    scope(|scope| {
        let let_go = ask_in_flight(scope, shared, "x", false);
        let ask = || {
            let ask =
                || shared.ask("y", 1, false, soon(), || panic::resume_unwind(Box::new("here")));
            panic::catch_unwind(AssertUnwindSafe(ask))
        };
        let asking: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
        while shared.count_waiting() < 8 {
            sleep(Duration::from_millis(1));
        }
        let_go.send(()).expect("the first");
        let ended: Vec<_> =
            asking.into_iter().map(|one| one.join().expect("it is caught")).collect();
        let told: Vec<Result<(), _>> = ended.into_iter().flatten().collect();
        assert_eq!(told, [Err(Missed::Panicked); 7], "one panics, and the others are told");
    });
    assert_eq!(shared.ask("y", 1, false, soon(), || ()), Ok(()));
}

/// Questions without a query, which nobody can multiply, overtake those with a query, of which a limited number waits.
#[test]
fn first_questions_overtake_and_a_full_queue_refuses() {
    let shared = &Shared::new(1, NO_PAUSE, 3);
    let (order, told) = channel();
    scope(|scope| {
        let go = ask_in_flight(scope, shared, "x", false);
        let wait = |name: &'static str, first, number| {
            let order = order.clone();
            let ask = move || order.send(name).expect("the test");
            scope.spawn(move || shared.ask(name, 1, first, soon(), ask));
            while shared.count_waiting() < number {
                sleep(Duration::from_millis(1));
            }
        };
        for (number, name) in ["a", "b", "c"].into_iter().enumerate() {
            wait(name, false, number + 1);
        }
        assert_eq!(shared.ask("d", 1, false, soon(), || ()), Err(Missed::QueueFull));
        wait("first", true, 4);
        // it takes along the callers of the same question
        wait("b", true, 5);
        go.send(()).expect("it waits");
    });
    drop(order);
    assert_eq!(told.iter().collect::<Vec<_>>(), ["first", "b", "a", "c"]);
}

/// A question waits for at most one question of another source, however many that source has, and always finds a place.
#[test]
fn sources_take_turns() {
    let shared = &Shared::new(1, NO_PAUSE, 9);
    let (order, told) = channel();
    scope(|scope| {
        let go = ask_in_flight(scope, shared, "x".to_owned(), false);
        let wait = |name: String, source, first, number| {
            let order = order.clone();
            let told = name.clone();
            let ask = move || order.send(told).expect("the test");
            scope.spawn(move || shared.ask(name, source, first, soon(), ask));
            while shared.count_waiting() < number {
                sleep(Duration::from_millis(1));
            }
        };
        (1..=9).for_each(|number| wait(format!("a{number}"), 1, false, number));
        assert_eq!(shared.ask("a10".to_owned(), 1, false, soon(), || ()), Err(Missed::QueueFull));
        wait("a0".to_owned(), 1, true, 10);
        wait("b1".to_owned(), 2, false, 11);
        wait("b2".to_owned(), 2, false, 12);
        // a question that another source shares is asked as early as that source's own would be
        wait("a9".to_owned(), 3, false, 13);
        go.send(()).expect("it waits");
    });
    drop(order);
    let order: Vec<_> = told.iter().collect();
    assert_eq!(order[..5], ["a9", "b1", "a0", "b2", "a1"], "{order:?}");
}

/// One question in flight is left for a source that has none.
#[test]
fn one_source_never_has_all_questions() {
    let shared = &Shared::new(3, NO_PAUSE, 64);
    let in_time = || Instant::now() + Duration::from_millis(300);
    scope(|scope| {
        let going = ["a", "b"].map(|question| ask_in_flight(scope, shared, question, true));
        assert_eq!(shared.ask("c", 1, true, in_time(), || ()), Err(Missed::NoTurn));
        assert_eq!(shared.ask("c", 2, false, in_time(), || ()), Ok(()));
        going.iter().for_each(|go| go.send(()).expect("it waits"));
    });
}

/// A caller of another source joins a question that waits for its turn. If the question is next by the newcomer's turn, the
/// caller with the latest deadline asks at once, although nothing else happens.
#[test]
fn a_newcomer_wakes_whoever_asks_for_it() {
    let shared = &Shared::new(2, NO_PAUSE, 9);
    scope(|scope| {
        let go = ask_in_flight(scope, shared, "x", false);
        // the last slot is not for this source; a caller that is counted already sleeps
        let first = scope.spawn(|| shared.ask("y", 1, false, soon(), || ()));
        while shared.count_waiting() < 1 {
            sleep(Duration::from_millis(1));
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        assert_eq!(shared.ask("y", 2, false, deadline, || ()), Ok(()));
        go.send(()).expect("it waits");
        assert_eq!(first.join().expect("no panic"), Ok(()));
    });
}
