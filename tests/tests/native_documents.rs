//! The documents name files: each of them is there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Where a path in a document may begin, beside the repository's root: what it says in its text.
const ROOTS: [&str; 5] = ["", "docs", "devices/src", "devices/src/virtio", "migration/src"];

fn repository() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("a repository around the tests").to_path_buf()
}

/// Sources between back-ticks, and the targets of links within the repository.
fn named(text: &str) -> BTreeSet<String> {
    let sources = text
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|word| word.ends_with(".rs") && !word.contains([' ', '*', '{', '<', '(']));
    let links = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
    let links = links.filter(|link| !link.is_empty() && !link.contains("://"));
    sources.chain(links).map(str::to_string).collect()
}

#[test]
fn every_file_that_a_document_names_is_there() {
    let root = repository();
    let mut documents: Vec<_> =
        ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"].map(|name| root.join(name)).into();
    for entry in fs::read_dir(root.join("docs")).expect("a directory of documents") {
        documents.push(entry.expect("a document").path());
    }
    let mut missing = Vec::new();
    let mut found = 0;
    for document in documents.iter().filter(|path| path.extension().is_some_and(|e| e == "md")) {
        for name in named(&fs::read_to_string(document).expect("a text")) {
            match ROOTS.iter().any(|base| root.join(base).join(&name).exists()) {
                true => found += 1,
                false => missing.push(format!("{}: {name}", document.display())),
            }
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
    assert!(found > 50, "only {found} files are named: are they still found in the text?");
}
