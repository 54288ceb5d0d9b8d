//! Text tables: columns as wide as their widest cell, separated by two spaces.

/// A table under construction. A cell can have several lines.
#[derive(Debug)]
pub(crate) struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
    no_header: bool,
}

impl Table {
    pub(crate) fn new(header: &[&'static str]) -> Self {
        Self {
            header: header.to_vec(),
            rows: Vec::new(),
            no_header: false,
        }
    }

    /// Returns the table without its header, if `hide` is set.
    pub(crate) fn hide_header(mut self, hide: bool) -> Self {
        self.no_header = hide;
        self
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let header: Vec<String> = self.header.iter().map(ToString::to_string).collect();
        let header = (!self.no_header).then_some(&header);
        let rows: Vec<&Vec<String>> = header.into_iter().chain(&self.rows).collect();
        let width = |column: usize| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells
                .flat_map(|cell| cell.lines())
                .map(|line| line.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.header.len()).map(width).collect();
        for row in rows {
            let height = row.iter().map(|cell| cell.lines().count()).max().unwrap_or(0);
            for at in 0..height {
                let mut line = String::new();
                for (cell, width) in row.iter().zip(&widths) {
                    let text = cell.lines().nth(at).unwrap_or("");
                    line += &format!("{text:<width$}  ");
                }
                writeln!(f, "{}", line.trim_end())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_with_multi_line_cells() {
        let mut table = Table::new(&["ID", "LABELS", "STATUS"]);
        table.row(["7".into(), "k8s:app=a\nk8s:b".into(), "ready".into()]);
        table.row(["1234".into(), String::new(), "ready".into()]);
        assert_eq!(
            table.to_string(),
            "ID    LABELS     STATUS\n\
             7     k8s:app=a  ready\n\
             \x20     k8s:b\n\
             1234             ready\n"
        );
        assert_eq!(
            table.hide_header(true).to_string(),
            "7     k8s:app=a  ready\n\x20     k8s:b\n1234             ready\n"
        );
    }
}
