//! Orders from the control plane: what came last counts. A worker that has nothing new pays one load.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

#[derive(Debug)]
struct Shared<T> {
    version: AtomicU64,
    content: Mutex<T>,
}

/// The end that gives orders.
#[derive(Debug)]
pub struct Writer<T>(Arc<Shared<T>>);

/// The end that follows them.
#[derive(Debug)]
pub struct Reader<T> {
    shared: Arc<Shared<T>>,
    seen: u64,
}

/// A mailbox with what counts at first.
#[must_use]
pub fn mailbox<T>(first: T) -> (Writer<T>, Reader<T>) {
    let shared = Arc::new(Shared {
        version: AtomicU64::new(0),
        content: Mutex::new(first),
    });
    let reader = Reader {
        shared: Arc::clone(&shared),
        seen: 0,
    };
    (Writer(shared), reader)
}

impl<T> Writer<T> {
    /// Changes what counts.
    pub fn change(&self, change: impl FnOnce(&mut T)) {
        let mut place = self.0.content.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut place);
        self.0.version.fetch_add(1, Ordering::Release);
    }
}

impl<T> Reader<T> {
    /// Whether there is something that has not been read.
    #[must_use]
    pub fn changed(&self) -> bool {
        self.shared.version.load(Ordering::Acquire) != self.seen
    }

    /// Reads what counts now, and may take out what is to be done once.
    pub fn read<R>(&mut self, read: impl FnOnce(&mut T) -> R) -> R {
        let mut place = self.shared.content.lock().unwrap_or_else(PoisonError::into_inner);
        self.seen = self.shared.version.load(Ordering::Acquire);
        read(&mut place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_last_counts_and_nothing_to_do_is_lost() {
        let (writer, mut reader) = mailbox((1, Vec::new()));
        assert!(!reader.changed());
        for n in 2..4 {
            writer.change(|content| {
                content.0 = n;
                content.1.push(n);
            });
        }
        assert!(reader.changed());
        let read = |content: &mut (i32, Vec<i32>)| (content.0, std::mem::take(&mut content.1));
        assert_eq!(reader.read(read), (3, vec![2, 3]));
        assert!(!reader.changed());
        assert_eq!(reader.read(read), (3, vec![]));
    }
}
