//! What the programs need of a kernel, tried out one by one.

use anyhow::Result;
use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};

/// Something that the programs need.
#[derive(Debug)]
pub struct Feature {
    /// What it is: a program type, a map type or a helper.
    pub kind: &'static str,
    /// The kernel's name of it.
    pub name: String,
    /// Whether it is there; an error where that cannot be told.
    pub found: Result<bool>,
}

/// The types of the programs. The iterator over listeners is not among them: a kernel
/// with BTF has it, and it cannot be tried without one of its targets.
const PROGRAMS: [(&str, ProgramType); 5] = [
    ("cgroup_sock_addr", ProgramType::CgroupSockAddr),
    ("cgroup_sockopt", ProgramType::CgroupSockopt),
    ("sock_ops", ProgramType::SockOps),
    ("sk_lookup", ProgramType::SkLookup),
    ("sched_cls", ProgramType::SchedClassifier),
];

/// The types of the maps; constants of the programs are in an array.
const MAPS: [(&str, MapType); 9] = [
    ("array", MapType::Array),
    ("percpu_array", MapType::PerCpuArray),
    ("hash", MapType::Hash),
    ("percpu_hash", MapType::PerCpuHash),
    ("lru_hash", MapType::LruHash),
    ("lpm_trie", MapType::LpmTrie),
    ("sockhash", MapType::SockHash),
    ("sk_storage", MapType::SkStorage),
    ("ringbuf", MapType::RingBuf),
];

macro_rules! helpers {
    ($($program:ident: $($helper:ident),+;)+) => {
        &[$($((ProgramType::$program, stringify!($helper), BpfHelper::$helper)),+),+]
    };
}

/// The helpers, each once for every type of program that calls it, the iterator left
/// out.
const HELPERS: &[(ProgramType, &str, BpfHelper)] = helpers! {
    CgroupSockAddr: BPF_FUNC_map_lookup_elem, BPF_FUNC_set_retval, BPF_FUNC_bind,
        BPF_FUNC_getsockopt, BPF_FUNC_setsockopt, BPF_FUNC_get_netns_cookie,
        BPF_FUNC_probe_read_kernel, BPF_FUNC_ktime_get_coarse_ns, BPF_FUNC_sk_storage_get,
        BPF_FUNC_sk_storage_delete;
    CgroupSockopt: BPF_FUNC_get_netns_cookie, BPF_FUNC_sk_storage_get;
    SockOps: BPF_FUNC_map_update_elem, BPF_FUNC_map_delete_elem, BPF_FUNC_get_netns_cookie,
        BPF_FUNC_setsockopt, BPF_FUNC_sock_ops_cb_flags_set, BPF_FUNC_sock_hash_update,
        BPF_FUNC_sk_storage_get, BPF_FUNC_sk_storage_delete;
    SkLookup: BPF_FUNC_sk_assign, BPF_FUNC_sk_release, BPF_FUNC_ringbuf_output;
    SchedClassifier: BPF_FUNC_skc_lookup_tcp, BPF_FUNC_sk_release, BPF_FUNC_sk_fullsock,
        BPF_FUNC_skb_load_bytes, BPF_FUNC_skb_store_bytes, BPF_FUNC_l3_csum_replace,
        BPF_FUNC_l4_csum_replace;
};

/// What the programs need, and whether it is there.
pub fn features() -> Vec<Feature> {
    let programs = PROGRAMS.map(|(name, kind)| Feature {
        kind: "program type",
        name: name.to_owned(),
        found: is_program_supported(kind).map_err(Into::into),
    });
    let maps = MAPS.map(|(name, kind)| Feature {
        kind: "map type",
        name: name.to_owned(),
        found: is_map_supported(kind).map_err(Into::into),
    });
    let helpers = HELPERS.iter().map(|&(program, name, helper)| Feature {
        kind: "helper",
        name: format!(
            "{} in {}",
            name.replace("BPF_FUNC", "bpf"),
            name_of(program)
        ),
        found: is_helper_supported(program, helper).map_err(Into::into),
    });
    programs.into_iter().chain(maps).chain(helpers).collect()
}

fn name_of(program: ProgramType) -> &'static str {
    let known = PROGRAMS.iter().find(|(_, kind)| *kind == program);
    known.map_or("a program", |(name, _)| name)
}
