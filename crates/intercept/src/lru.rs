//! A bounded map that removes the least recently used entries.

use std::{collections::HashMap, hash::Hash};

#[derive(Debug)]
pub(crate) struct Lru<K, V> {
    entries: HashMap<K, (u64, V)>,
    uses: u64,
    most: usize,
}

impl<K: Hash + Eq + Clone, V> Lru<K, V> {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            entries: HashMap::new(),
            uses: 0,
            most,
        }
    }

    pub(crate) fn get(&mut self, key: &K) -> Option<&V> {
        self.get_mut(key).map(|value| &*value)
    }

    pub(crate) fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.uses += 1;
        let (used, value) = self.entries.get_mut(key)?;
        *used = self.uses;
        Some(value)
    }

    pub(crate) fn insert(&mut self, key: K, value: V) {
        self.uses += 1;
        if self.entries.len() >= self.most && !self.entries.contains_key(&key) {
            // Removing an eighth at once bounds the cost of one insertion to a few steps on average.
            let mut uses: Vec<u64> = self.entries.values().map(|(used, _)| *used).collect();
            let at = uses.len() / 8;
            let (_, limit, _) = uses.select_nth_unstable(at);
            let limit = *limit;
            self.entries.retain(|_, (used, _)| *used > limit);
        }
        self.entries.insert(key, (self.uses, value));
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.entries.values().map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entries_that_were_used_least_recently_are_removed() {
        let mut lru = Lru::new(8);
        for key in 0..8 {
            lru.insert(key, key);
        }
        assert_eq!(lru.get(&0), Some(&0));
        lru.insert(8, 8);
        let found: Vec<Option<i32>> = [0, 1, 8].iter().map(|key| lru.get(key).copied()).collect();
        assert_eq!(found, [Some(0), None, Some(8)]);
        for key in 9..1000 {
            lru.insert(key, key);
            assert!(lru.entries.len() <= 8);
        }
    }
}
