//! Limits of the verifier.

mod program;

use std::collections::{BTreeSet, HashMap};

use object::{Object as _, ObjectSection as _, ObjectSymbol as _};
use palisade_abi::programs;
use program::{NIC, World};

/// Most instructions that the verifier may process for a program; the kernel allows 1,000,000. Far above the present
/// numbers (docs/VERIFIER.md), and far below those that take a second to load.
const BOUND: u32 = 100_000;

/// Prints and checks the verified instructions of the programs that give verdicts.
fn check_verified(object: &[u8]) {
    let verified = World::of(object, NIC, 1, 1024).verified();
    for name in [programs::XDP_INGRESS, programs::TC_INGRESS, programs::TC_EGRESS] {
        let count = verified
            .iter()
            .find(|(found, _)| found == name)
            .map(|(_, count)| *count);
        println!("{name}: {count:?} instructions verified");
        assert!(count.is_some_and(|count| count < BOUND), "{name}: {count:?}");
    }
}

#[test]
fn the_verifier_processes_few_instructions() {
    check_verified(palisade_datapath::OBJECT);
}

#[test]
fn the_verifier_processes_few_instructions_of_the_programs_for_captures() {
    check_verified(palisade_datapath::CAPTURE_OBJECT);
}

#[test]
fn the_shipped_object_has_the_programs_of_the_abi_and_no_other() {
    let mut names: Vec<String> = World::new(NIC, 1)
        .verified()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    names.sort();
    let mut expected = programs::ALL.map(String::from);
    expected.sort();
    assert_eq!(names, expected);
}

/// Stack limit of a call chain, bytes (`MAX_BPF_STACK`).
const STACK: u32 = 512;
/// Rounding of stack frames, bytes. Linux 6.1, the oldest supported release, always rounds to 32 as for its
/// interpreter; newer kernels round to 16 if the JIT compiler is enabled.
const GRANULE: u32 = 32;
/// Most functions in a call chain (`MAX_CALL_FRAMES`).
const FRAMES: usize = 8;

/// Function of the object, as the verifier sees it.
struct Function {
    name: String,
    section: object::SectionIndex,
    start: u64,
    end: u64,
    /// Lowest stack address that is computed or used, bytes below the frame pointer.
    depth: u32,
    /// Indices of the called functions.
    calls: BTreeSet<usize>,
}

/// Returns the path of a Rust symbol (`_ZN8palisade9conntrack6insert17h…E`), or the name unchanged.
fn path(symbol: &str) -> String {
    let Some(mut rest) = symbol.strip_prefix("_ZN") else {
        return symbol.into();
    };
    let mut parts = Vec::new();
    while let Some(digits) = rest
        .find(|c: char| !c.is_ascii_digit())
        .filter(|&digits| digits > 0)
    {
        let length: usize = rest[..digits].parse().unwrap();
        parts.push(&rest[digits..digits + length]);
        rest = &rest[digits + length..];
    }
    parts.pop(); // the hash
    parts.join("::")
}

/// Returns the functions of the object with their stack use and calls.
fn functions(object: &[u8]) -> Vec<Function> {
    let file = object::File::parse(object).unwrap();
    let mut functions: Vec<Function> = file
        .symbols()
        .filter(|symbol| symbol.kind() == object::SymbolKind::Text && symbol.size() > 0)
        .map(|symbol| Function {
            name: path(symbol.name().unwrap()),
            section: symbol.section_index().unwrap(),
            start: symbol.address(),
            end: symbol.address() + symbol.size(),
            depth: 0,
            calls: BTreeSet::new(),
        })
        .collect();
    let places: Vec<_> = functions
        .iter()
        .map(|function| (function.section, function.start, function.end))
        .collect();
    let at = |section, offset: u64| {
        places
            .iter()
            .position(|&(its, start, end)| its == section && (start..end).contains(&offset))
            .unwrap_or_else(|| panic!("no function at {section} + {offset}"))
    };
    for function in &mut functions {
        let section = file.section_by_index(function.section).unwrap();
        let code = section.data().unwrap();
        let relocations: HashMap<u64, object::Relocation> = section.relocations().collect();
        // Offset of each register below the frame pointer, if it points there. One pass in code order is enough, since
        // LLVM computes such addresses by a copy of r10 and an addition in one block.
        let mut below = [None::<i32>; 11];
        below[10] = Some(0);
        for offset in (function.start..function.end).step_by(8) {
            let word: [u8; 8] = code[offset as usize..][..8].try_into().unwrap();
            let [operation, registers, ..] = word;
            let displacement = i32::from(i16::from_le_bytes([word[2], word[3]]));
            let immediate = i32::from_le_bytes(word[4..].try_into().unwrap());
            let (to, from) = (usize::from(registers & 15), usize::from(registers >> 4));
            let mut used = |lowest: i32| function.depth = function.depth.max(lowest.min(0).unsigned_abs());
            match operation & 7 {
                // Loads and stores.
                1 => {
                    if let Some(base) = below[from] {
                        used(base + displacement);
                    }
                    below[to] = None;
                }
                2 | 3 => {
                    if let Some(base) = below[to] {
                        used(base + displacement);
                    }
                }
                // 64-bit copy, and addition of a constant.
                7 if operation == 0xbf => below[to] = below[from],
                7 if operation == 0x07 => {
                    below[to] = below[to].map(|base| base + immediate);
                    if let Some(base) = below[to] {
                        used(base);
                    }
                }
                0 | 4 | 7 => below[to] = None,
                _ => {}
            }
            // A call of a function of the object (BPF_PSEUDO_CALL), not of a helper.
            if operation == 0x85 && from == 1 {
                let callee = match relocations.get(&offset) {
                    Some(relocation) => {
                        let object::RelocationTarget::Symbol(symbol) = relocation.target() else {
                            panic!("{}: a call of no symbol", function.name);
                        };
                        let symbol = file.symbol_by_index(symbol).unwrap();
                        let to = symbol.section_index().unwrap();
                        // For a relocation against a section, the immediate is the offset in it.
                        match symbol.kind() {
                            object::SymbolKind::Section => at(to, ((immediate + 1) * 8) as u64),
                            _ => at(to, symbol.address()),
                        }
                    }
                    None => at(
                        function.section,
                        (offset as i64 + 8 + i64::from(immediate) * 8) as u64,
                    ),
                };
                function.calls.insert(callee);
            }
            if operation == 0x85 {
                below[..6].fill(None);
            }
        }
    }
    functions
}

/// Returns the call chain of a function with the largest stack use, and this use in bytes. It ends, since the verifier
/// allows no recursion.
fn deepest(functions: &[Function], from: usize) -> (u32, Vec<usize>) {
    let (below, mut chain) = functions[from]
        .calls
        .iter()
        .map(|&callee| deepest(functions, callee))
        .max()
        .unwrap_or_default();
    chain.insert(0, from);
    (
        below + functions[from].depth.max(1).next_multiple_of(GRANULE),
        chain,
    )
}

#[test]
fn no_call_chain_exceeds_the_stack_of_the_oldest_kernel() {
    check_chains(palisade_datapath::OBJECT);
}

#[test]
fn no_call_chain_of_the_programs_for_captures_exceeds_the_stack_of_the_oldest_kernel() {
    check_chains(palisade_datapath::CAPTURE_OBJECT);
}

fn check_chains(object: &[u8]) {
    let functions = functions(object);
    for name in programs::ALL {
        let program = functions
            .iter()
            .position(|function| function.name == name)
            .unwrap();
        let (bytes, chain) = deepest(&functions, program);
        let text: Vec<String> = chain
            .iter()
            .map(|&function| format!("{} {}", functions[function].name, functions[function].depth))
            .collect();
        println!("{bytes} bytes of {STACK}: {}", text.join(" > "));
        assert!(bytes <= STACK, "{name}: {bytes} bytes: {}", text.join(" > "));
        assert!(chain.len() <= FRAMES, "{name}: {} functions deep", chain.len());
    }
}
