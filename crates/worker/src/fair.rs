//! Who has to give way when there is more than can be read.

/// Flows are told apart by so many parts of their hash.
const BUCKETS: usize = 256;
/// What was admitted counts for so long, ns.
const INTERVAL: u64 = 10_000_000;

/// What was admitted of each flow in the current interval.
pub struct Fair {
    admitted: [u32; BUCKETS],
    since: u64,
    ranks: Vec<u32>,
    sorted: Vec<u32>,
}

impl Fair {
    /// For batches of so many packets.
    pub fn new(batch: usize) -> Self {
        Self {
            admitted: [0; BUCKETS],
            since: 0,
            ranks: Vec::with_capacity(batch),
            sorted: Vec::with_capacity(batch),
        }
    }

    /// The time goes on.
    pub fn at(&mut self, now: u64) {
        if now.saturating_sub(self.since) >= INTERVAL {
            self.admitted.fill(0);
            self.since = now;
        }
    }

    /// Chooses the half of a batch that is read: of the flows that have had least. Tells `refuse` the places of the
    /// others.
    pub fn halve(&mut self, hashes: impl Iterator<Item = u32> + Clone, mut refuse: impl FnMut(usize)) {
        self.ranks.clear();
        for hash in hashes.clone() {
            let had = &mut self.admitted[bucket(hash)];
            self.ranks.push(*had);
            *had += 1;
        }
        self.sorted.clear();
        self.sorted.extend_from_slice(&self.ranks);
        let half = self.ranks.len() / 2;
        if half == 0 {
            return;
        }
        let (below, limit, _) = self.sorted.select_nth_unstable(half);
        let limit = *limit;
        // Of those that have had just as much, the first.
        let mut ties = half - below.iter().filter(|rank| **rank < limit).count();
        for (place, hash) in hashes.enumerate() {
            let rank = self.ranks[place];
            if rank < limit {
                continue;
            }
            if rank == limit && ties > 0 {
                ties -= 1;
                continue;
            }
            self.admitted[bucket(hash)] -= 1;
            refuse(place);
        }
    }
}

/// Not by the bits that chose the worker.
const fn bucket(hash: u32) -> usize {
    (hash.wrapping_mul(0x9e37_79b1) >> 24) as usize % BUCKETS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(fair: &mut Fair, hashes: &[u32]) -> Vec<u32> {
        let mut refused = Vec::new();
        fair.halve(hashes.iter().copied(), |place| refused.push(hashes[place]));
        refused
    }

    #[test]
    fn small_flows_get_through_where_a_large_one_floods() {
        let mut fair = Fair::new(64);
        fair.at(INTERVAL);
        for round in 0..100u32 {
            // Ten flows, each a packet a round, behind and between fifty of another.
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
    fn flows_that_want_the_same_get_the_same() {
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
    fn the_past_is_forgotten() {
        let mut fair = Fair::new(4);
        fair.at(INTERVAL);
        refused(&mut fair, &[1; 9]);
        assert_eq!(refused(&mut fair, &[1, 1, 9, 9]), [1, 1]);
        fair.at(INTERVAL + INTERVAL);
        assert_eq!(refused(&mut fair, &[1, 1, 9, 9]), [1, 9]);
    }
}
