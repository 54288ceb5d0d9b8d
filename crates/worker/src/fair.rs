//! Fair shedding: the choice of the packets to drop when more packets arrive than the worker can inspect. A flood loses
//! packets before small flows do. This module depends on nothing else in this crate; start at [`Fair::halve`].

/// Number of counters. The hash of a flow selects its counter.
const BUCKETS: usize = 256;
/// Interval after which the counters are reset to zero, ns.
const INTERVAL: u64 = 10_000_000;

/// Numbers of the packets admitted in the current interval, by bucket. A bucket is the set of flows that share a
/// counter.
pub(crate) struct Fair {
    admitted: [u32; BUCKETS],
    /// Start of the interval, ns.
    since: u64,
    /// Rank of each packet of a batch: the number of packets of its bucket that were admitted in this interval or come
    /// before it in the batch.
    ranks: Vec<u32>,
    /// The ranks, partially sorted.
    sorted: Vec<u32>,
}

impl Fair {
    /// Creates the counters. `batch`: maximum number of packets per batch.
    pub(crate) fn new(batch: usize) -> Self {
        Self {
            admitted: [0; BUCKETS],
            since: 0,
            ranks: Vec::with_capacity(batch),
            sorted: Vec::with_capacity(batch),
        }
    }

    /// Starts a new interval if the current one has ended. `now`: ns.
    pub(crate) fn advance(&mut self, now: u64) {
        if now.saturating_sub(self.since) >= INTERVAL {
            self.admitted.fill(0);
            self.since = now;
        }
    }

    /// Admits half of a batch, rounded down, but at least one packet: the packets with the lowest ranks. Calls `refuse`
    /// with the index of each other packet. `hashes`: the packets' flow hashes.
    pub(crate) fn halve(&mut self, hashes: impl Iterator<Item = u32> + Clone, mut refuse: impl FnMut(usize)) {
        self.ranks.clear();
        for hash in hashes.clone() {
            let admitted = bucket(&mut self.admitted, hash);
            let rank = *admitted;
            *admitted += 1;
            self.ranks.push(rank);
        }
        self.sorted.clear();
        self.sorted.extend_from_slice(&self.ranks);
        let half = self.ranks.len() / 2;
        if half == 0 {
            return;
        }
        let (below, limit, _) = self.sorted.select_nth_unstable(half);
        let limit = *limit;
        // Number of packets with the rank `limit` that are admitted to complete the half.
        let mut ties = half - below.iter().filter(|rank| **rank < limit).count();
        for (index, (hash, rank)) in hashes.zip(&self.ranks).enumerate() {
            let rank = *rank;
            if rank < limit {
                continue;
            }
            if rank == limit && ties > 0 {
                ties -= 1;
                continue;
            }
            *bucket(&mut self.admitted, hash) -= 1;
            refuse(index);
        }
    }
}

/// Returns the counter of a flow hash. The hash is multiplied first, because all flows of a worker have the same hash
/// modulo the number of workers.
const fn bucket(admitted: &mut [u32; BUCKETS], hash: u32) -> &mut u32 {
    let index = hash.wrapping_mul(0x9e37_79b1) >> 24;
    #[allow(
        clippy::indexing_slicing,
        reason = "eight bits index 256 counters; the compiler leaves out the check"
    )]
    &mut admitted[index as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(fair: &mut Fair, hashes: &[u32]) -> Vec<u32> {
        let mut refused = Vec::new();
        fair.halve(hashes.iter().copied(), |index| refused.push(hashes[index]));
        refused
    }

    #[test]
    fn only_the_flooding_flow_loses_packets() {
        let mut fair = Fair::new(64);
        fair.advance(INTERVAL);
        for round in 0..100u32 {
            // Ten flows with one packet per round, interleaved with fifty packets of another flow.
            let batch: Vec<u32> = (0..60)
                .map(|n| if n % 6 == 5 { 1_000 + n * 977 } else { 1 })
                .collect();
            let refused = refused(&mut fair, &batch);
            assert_eq!(refused.len(), 30, "round {round}");
            assert!(
                refused.iter().all(|hash| *hash == 1),
                "round {round}: {refused:?}"
            );
        }
    }

    #[test]
    fn equal_flows_lose_equally() {
        let mut fair = Fair::new(64);
        let mut lost = [0; 4];
        for _ in 0..100 {
            let batch: Vec<u32> = (0..64).map(|n| n / 16 * 5_003).collect();
            for hash in refused(&mut fair, &batch) {
                lost[hash as usize / 5_003] += 1;
            }
        }
        assert!(lost.iter().all(|lost| (780..=820).contains(lost)), "{lost:?}");
    }

    #[test]
    fn a_new_interval_forgets_what_was_admitted() {
        let mut fair = Fair::new(4);
        fair.advance(INTERVAL);
        refused(&mut fair, &[1; 9]);
        assert_eq!(refused(&mut fair, &[1, 1, 9, 9]), [1, 1]);
        fair.advance(INTERVAL + INTERVAL);
        assert_eq!(refused(&mut fair, &[1, 1, 9, 9]), [1, 9]);
    }
}
