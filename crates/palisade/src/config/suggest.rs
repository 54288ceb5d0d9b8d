//! "Did you mean": the known word nearest to an unknown one.

/// Returns `; did you mean 'WORD'?`; empty if no word is near.
pub(super) fn suggestion<'a>(wrong: &str, words: impl IntoIterator<Item = &'a str>) -> String {
    let near = (wrong.chars().count() / 3).max(1) + 1;
    words
        .into_iter()
        .map(|word| (distance(wrong, word), word))
        .filter(|(distance, _)| *distance <= near)
        .min()
        .map_or_else(String::new, |(_, word)| format!("; did you mean '{word}'?"))
}

/// Returns the number of insertions, deletions, replacements and swaps of neighbours (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let changed = usize::from(a[i - 1] != b[j - 1]);
            row[j] = (rows[i - 1][j] + 1)
                .min(row[j - 1] + 1)
                .min(rows[i - 1][j - 1] + changed);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(rows[i - 2][j - 2] + 1);
            }
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_near_word_is_suggested() {
        let words = ["enforcement", "audit", "dir"];
        assert_eq!(suggestion("enforcment", words), "; did you mean 'enforcement'?");
        assert_eq!(suggestion("aduit", words), "; did you mean 'audit'?");
        assert_eq!(suggestion("colour", words), "");
    }

    #[test]
    fn swapped_neighbours_count_as_one_edit() {
        assert_eq!(distance("ab", "ba"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("netns", "netns"), 0);
    }
}
