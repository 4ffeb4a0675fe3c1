//! The questions of a listener's checks to Patroni. In goes the question of one check, out comes what was heard, for all
//! checks that ask the same. Knows nothing of what an answer means.

use crate::clock::now;
use crate::listen::share::{Missed, Shared};
use crate::patroni::ask::{Heard, blame};
use crate::patroni::check::Check;
use crate::patroni::http::NO_ANSWER;
use crate::patroni::location::{Patroni, beside_localhost};
use crate::run::before_stop::Patience;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// Questions to Patroni at once, of which one source has all but one, and the least time between two: its REST API has five
/// workers, a queue of five, and shares one core with its main loop. Each question takes a millisecond of that.
const AT_ONCE: usize = 5;
const LEAST_INTERVAL: Duration = Duration::from_millis(2);
/// Different questions with a query of one source that may wait: anybody can make up another one, and it would wait for its
/// deadline.
const QUEUE_LIMIT: usize = 64;

/// Checks share a question that have the same path, and look for Patroni at the same address beside localhost.
type SameQuestion = (String, Option<IpAddr>);

/// All questions of one listener, by the address that asks the agent.
pub struct Questions(Shared<SameQuestion, Option<IpAddr>, Heard>);

impl Default for Questions {
    fn default() -> Questions {
        Questions(Shared::new(AT_ONCE, LEAST_INTERVAL, QUEUE_LIMIT))
    }
}

impl Questions {
    /// Asks Patroni, or waits for the answer to the same question of another check. Only the check that asks reads the
    /// certificates. `source` is who asked.
    pub fn ask(
        &self,
        patroni: &Patroni,
        agent_address: Option<SocketAddr>,
        source: Option<IpAddr>,
        check: &Check,
        patience: &Patience,
    ) -> Heard {
        let since = now();
        let question =
            (check.path().to_owned(), beside_localhost(agent_address).map(|address| address.ip()));
        let first = check.plain_number().is_some();
        let ask = || patroni.prepare(agent_address).ask(check, patience);
        self.0.ask(question, source, first, patience.deadline, ask).unwrap_or_else(|missed| {
            let why = match missed {
                Missed::Unasked => &format!("{NO_ANSWER}: too many others are waiting"),
                Missed::Crowded => "not asked: too many different questions are waiting",
                Missed::Unanswered => NO_ANSWER,
                Missed::Broken => "not asked because of a bug in patroni-agent-check",
            };
            let answer = Err(blame(&patroni.connect_to, why.to_owned().into()));
            let from = patroni.candidate_endpoints(agent_address);
            Heard { from, answer, asked: since, answered: now() }
        })
    }
}
