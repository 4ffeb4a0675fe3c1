//! The questions of a listener's checks to Patroni. In goes the question of one check, out comes its outcome, which checks
//! with the same question share. Knows nothing of what an answer means.

use crate::clock::now;
use crate::listen::share::{Missed, Shared};
use crate::patroni::ask::{Outcome, name_patroni};
use crate::patroni::check::Check;
use crate::patroni::http::NO_ANSWER;
use crate::patroni::location::{Patroni, unless_loopback};
use crate::run::before_stop::Patience;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// The most questions in flight, and the least time between two. One source never has all five in flight. Patroni's REST
/// API has five workers and a queue of five, and shares one core with Patroni's main loop. A question takes a millisecond.
const AT_ONCE: usize = 5;
const LEAST_INTERVAL: Duration = Duration::from_millis(2);
/// How many questions with a query may wait for one source. Any peer can make up any number of queries.
const QUEUE_LIMIT: usize = 64;

/// Checks share a question if they have the same path and look for Patroni on the same address besides localhost.
type SameQuestion = (String, Option<IpAddr>);

/// All questions of one listener, by the source that asks the agent.
pub struct Questions(Shared<SameQuestion, Option<IpAddr>, Outcome>);

impl Default for Questions {
    fn default() -> Questions {
        Questions(Shared::new(AT_ONCE, LEAST_INTERVAL, QUEUE_LIMIT))
    }
}

impl Questions {
    /// Asks Patroni, or shares another check's answer. Only the check that asks reads the certificates.
    pub fn ask(
        &self,
        patroni: &Patroni,
        agent_address: Option<SocketAddr>,
        source: Option<IpAddr>,
        check: &Check,
        patience: &Patience,
    ) -> Outcome {
        let since = now();
        let question =
            (check.path().to_owned(), unless_loopback(agent_address).map(|address| address.ip()));
        let first = check.plain_number().is_some();
        let ask = || patroni.prepare(agent_address).ask(check, patience);
        self.0.ask(question, source, first, patience.deadline, ask).unwrap_or_else(|missed| {
            let why = match missed {
                Missed::NoTurn => &format!("{NO_ANSWER}: too many others are waiting"),
                Missed::QueueFull => "not asked: too many different questions are waiting",
                Missed::NoAnswer => NO_ANSWER,
                Missed::Panicked => "not asked because of a bug in patroni-agent-check",
            };
            let answer = Err(name_patroni(&patroni.connect_to, why.to_owned().into()));
            let from = patroni.candidate_endpoints(agent_address);
            Outcome { from, answer, asked: since, answered: now() }
        })
    }
}
