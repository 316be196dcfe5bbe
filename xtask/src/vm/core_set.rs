//! The core set: the tests that every kernel has to pass before a change is taken.
//!
//! A whole run in an emulated machine takes most of an hour. These are the ones that tell
//! most about a *kernel* for their time: whether its verifier takes every program, whether
//! every hook does what the agent builds on, and what its socket maps do.

/// Each is a part of names, as the test runner takes it; what ends in `::` is a whole module.
pub(super) const TESTS: &[&str] = &[
    // The verifier, the helpers, the self-test of splicing.
    "check::",
    // Listeners that come and go, before and after the agent; settings that change;
    // agents that end.
    "lifecycle::",
    // Verdicts and original destinations beside iptables' own: IPv4, IPv6 and mapped
    // addresses, outbound, inbound and within the pod, ports and ranges in and out.
    "differential::every_owner_from_every_source_to_every_destination",
    // connect(), bind() and getsockopt() where kernels differ.
    "sockets::bound::a_source_port_stays",
    "sockets::bound::an_ipv6_socket_to_a_mapped_address_follows_the_rules_of_ipv4",
    "sockets::connecting::data_in_the_syn_goes_to_the_proxy_by_msg_fastopen",
    "sockets::options::the_original_destination_is_told_into_any_buffer_that_holds_it",
    "sockets::options::the_original_destination_of_the_other_family_is_not_told",
    // The owner, which is read from the kernel's structures.
    "owner::the_owner_of_a_socket_is_who_opened_it",
    // Excluded interfaces, and addresses that change.
    "network::what_goes_through_an_excluded_interface_is_direct",
    "network::an_address_that_is_added_is_the_pods_own_until_it_is_removed",
    // DNS over UDP.
    "dns::sockets::an_answer_comes_from_the_server_that_was_asked",
    "dns::verdicts::an_excluded_port_53_is_left_alone",
    // Splicing: what this kernel may do, and bytes that arrive whole.
    "splice::order::what_was_sent_before_the_connection_is_spliced_comes_first",
    "splice::slow_reader::it_holds_no_more_than_its_buffer_and_reads_on_without_loss",
    "splice::setting::a_socket_in_blocking_mode_is_not_spliced",
    // A machine behind the pod: the programs at tc.
    "virtual::a_machines_connections_reach_the_proxy_as_with_rules",
    // Pinned links, which the next agent takes over.
    "upgrade::an_agent_that_is_killed_leaves_no_gap",
];
