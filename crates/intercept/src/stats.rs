//! Counters of one thread, readable by other threads.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::failure::FailureKind;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        /// Counters of one thread.
        #[derive(Debug)]
        pub(crate) struct Counters {
            $($(#[$doc])* pub(crate) $name: AtomicU64,)*
            pub(crate) failures: [AtomicU64; FailureKind::ALL.len()],
        }

        impl Default for Counters {
            fn default() -> Self {
                Self {
                    $($name: AtomicU64::new(0),)*
                    failures: [const { AtomicU64::new(0) }; _],
                }
            }
        }

        /// Counters of all threads.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
            /// Failures of upstream connections, by [`FailureKind`].
            pub failures: [u64; FailureKind::ALL.len()],
        }

        impl Default for Stats {
            fn default() -> Self {
                Self { $($name: 0,)* failures: [0; _] }
            }
        }

        impl Stats {
            /// Returns the names and values of all counters except the failures.
            #[must_use]
            pub fn named(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }

            pub(crate) fn add(&mut self, of: &Counters) {
                $(self.$name += of.$name.load(Relaxed);)*
                for (sum, count) in self.failures.iter_mut().zip(&of.failures) {
                    *sum += count.load(Relaxed);
                }
            }
        }
    };
}

counters! {
    /// Connections that were accepted.
    accepted;
    /// Connections that are open now.
    open;
    /// Connections that were reset because no flow is known for their addresses.
    unknown;
    /// Connections that were reset or closed because a limit was reached.
    limited;
    /// ClientHellos that were refused: malformed, or no rule allows the server name.
    hellos_refused;
    /// TLS handshakes with clients that were completed.
    client_handshakes;
    /// TLS handshakes that failed because of the client.
    client_handshakes_failed;
    /// TLS handshakes with servers that were completed.
    upstream_handshakes;
    /// HTTP requests.
    requests;
    /// HTTP requests that no rule allows.
    denied;
    /// Connections that were ended because the policy has changed.
    cut;
    /// Connections that were ended by a deadline.
    timeouts;
    /// Application bytes from clients.
    bytes_from_clients;
    /// Application bytes from servers.
    bytes_from_servers;
    /// Restarts of the thread.
    restarts;
}

pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

impl Counters {
    pub(crate) fn count_failure(&self, kind: FailureKind) {
        if let Some(counter) = self.failures.get(kind as usize) {
            count(counter);
        }
    }
}
