//! The YAML parser: scalars, places, anchors, merge keys, errors.

use crate::{Node, Position, Value, documents};

/// Returns the documents of a text without errors, as JSON.
#[track_caller]
fn json(text: &str) -> Vec<String> {
    let (documents, errors) = documents(text);
    assert!(errors.is_empty(), "{errors:?}");
    documents
        .iter()
        .map(|document| document.to_json().to_string())
        .collect()
}

#[track_caller]
fn errors(text: &str) -> Vec<String> {
    documents(text)
        .1
        .into_iter()
        .map(|error| {
            format!(
                "{}:{}: {}",
                error.position.line, error.position.column, error.message
            )
        })
        .collect()
}

fn at(node: Option<&Node>) -> (u32, u32) {
    let Position { line, column } = node.expect("a node").position;
    (line, column)
}

#[test]
fn scalars() {
    assert_eq!(
        json(
            "[~, null, '', a, 'null', true, False, yes, 1, -1, 0x10, 0o17, 1.5, .inf, 1e3, 1.2.3, 10.0.0.0/8, 0, !!str 1]"
        ),
        [
            r#"[null,null,"","a","null",true,false,"yes",1,-1,16,15,1.5,".inf",1000.0,"1.2.3","10.0.0.0/8",0,"1"]"#
        ]
    );
    assert_eq!(
        json("a: |\n  x\n  y\nb: >-\n  x\n  y\n"),
        [r#"{"a":"x\ny\n","b":"x y"}"#]
    );
    assert_eq!(json("1: a\ntrue: b\n"), [r#"{"1":"a","true":"b"}"#]);
}

#[test]
fn documents_of_a_text() {
    assert_eq!(json(""), [""; 0]);
    assert_eq!(json("# nothing\n"), [""; 0]);
    assert_eq!(
        json("---\n---\na: 1\n...\n---\nb\n"),
        ["null", r#"{"a":1}"#, r#""b""#]
    );
    assert_eq!(json("\u{feff}a: 1\r\nb: 2\r\n"), [r#"{"a":1,"b":2}"#]);
    assert_eq!(
        json("{\n\t\"a\": [1, \"x\\u00e9\\/\"]\n}"),
        [r#"{"a":[1,"xé/"]}"#]
    );
}

#[test]
fn line_and_column_count_characters_from_one() {
    let (documents, _) = documents("ä: {b: [x, 'y']}\n---\nc:\n  - d\n  -   e: f\ng:\n");
    let first = documents[0].get("ä");
    assert_eq!(at(first), (1, 4));
    let Some(Value::List(items)) = first.and_then(|node| node.get("b")).map(|node| &node.value) else {
        panic!()
    };
    assert_eq!((at(items.first()), at(items.get(1))), ((1, 9), (1, 12)));
    let Some(Value::List(items)) = documents[1].get("c").map(|node| &node.value) else {
        panic!()
    };
    assert_eq!((at(items.first()), at(items.get(1))), ((4, 5), (5, 7)));
    assert_eq!(at(items[1].get("e")), (5, 10));
    assert_eq!(
        at(documents[1].get("g")).0,
        6,
        "what is not there has the place of its key's line"
    );
}

#[test]
fn anchors_and_merge_keys() {
    assert_eq!(json("a: &x {b: 1}\nc: *x\n"), [r#"{"a":{"b":1},"c":{"b":1}}"#]);
    assert_eq!(
        json("base: &b {x: 1, y: 2}\nother: &o {y: 3, z: 4}\nall: {<<: [*b, *o], x: 9}\n"),
        [r#"{"base":{"x":1,"y":2},"other":{"y":3,"z":4},"all":{"x":9,"y":2,"z":4}}"#]
    );
    assert_eq!(
        errors("a: *x\n"),
        [
            "1:4: a value that begins with * must be quoted, like \"*x\"; without quotes it is an alias (while parsing \
             node, found unknown anchor)"
        ]
    );
    assert_eq!(
        errors("a: &x 1\n---\nb: *x\n"),
        ["3:4: this alias has no anchor in this document"]
    );
    assert_eq!(
        errors("&x [*x]\n"),
        ["1:5: this alias is inside the value of its own anchor"]
    );
    assert_eq!(
        errors("<<: 1\n"),
        ["1:5: only an object can be merged by <<, found the number 1"]
    );
}

#[test]
fn invalid_yaml_is_refused() {
    assert_eq!(
        errors("a: 1\nb: {c: 1, c: 2}\na: 2\n"),
        ["2:11: \"c\" occurs twice", "3:1: \"a\" occurs twice"]
    );
    assert_eq!(
        errors("? [a]\n: b\n"),
        ["1:3: a key must be a string, found a list"]
    );
    assert_eq!(
        errors("a: !secret x\n"),
        ["1:12: the tag \"!secret\" is not known"]
    );
    let unclosed = errors("a: [1\nb: 2\n");
    assert_eq!(unclosed.len(), 1);
    assert!(unclosed[0].starts_with("2:"), "{unclosed:?}");
}

#[test]
fn documents_before_a_syntax_error_are_returned() {
    let (documents, errors) = documents("a: 1\n---\nb: [\n");
    assert_eq!((documents.len(), errors.len()), (1, 1));
}
