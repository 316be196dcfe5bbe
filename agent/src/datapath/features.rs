//! What the programs need of a kernel, tried out one by one.

use anyhow::Result;
use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};

/// What the programs need, by the kernel's names, and whether it is there. An error
/// where that cannot be told. The iterator over listeners is not among it: a kernel
/// with BTF has it, and it cannot be tried without one of its targets.
pub fn features() -> Vec<(String, Result<bool>)> {
    use BpfHelper as Helper;
    let programs = [
        ("cgroup_sock_addr", ProgramType::CgroupSockAddr),
        ("cgroup_sockopt", ProgramType::CgroupSockopt),
        ("sock_ops", ProgramType::SockOps),
        ("sk_lookup", ProgramType::SkLookup),
    ];
    let maps = [
        ("hash", MapType::Hash),
        ("lpm_trie", MapType::LpmTrie),
        ("sockhash", MapType::SockHash),
        ("sk_storage", MapType::SkStorage),
        ("ringbuf", MapType::RingBuf),
    ];
    let helpers = [
        (
            "bpf_set_retval",
            ProgramType::CgroupSockAddr,
            Helper::BPF_FUNC_set_retval,
        ),
        (
            "bpf_bind",
            ProgramType::CgroupSockAddr,
            Helper::BPF_FUNC_bind,
        ),
        (
            "bpf_get_netns_cookie",
            ProgramType::SockOps,
            Helper::BPF_FUNC_get_netns_cookie,
        ),
        (
            "bpf_probe_read_kernel",
            ProgramType::CgroupSockAddr,
            Helper::BPF_FUNC_probe_read_kernel,
        ),
        (
            "bpf_sk_assign",
            ProgramType::SkLookup,
            Helper::BPF_FUNC_sk_assign,
        ),
    ];
    let programs = programs.map(|(name, kind)| {
        let found = is_program_supported(kind).map_err(Into::into);
        (format!("program type {name}"), found)
    });
    let maps = maps.map(|(name, kind)| {
        let found = is_map_supported(kind).map_err(Into::into);
        (format!("map type {name}"), found)
    });
    let helpers = helpers.map(|(name, kind, helper)| {
        let found = is_helper_supported(kind, helper).map_err(Into::into);
        (format!("helper {name}"), found)
    });
    programs.into_iter().chain(maps).chain(helpers).collect()
}
