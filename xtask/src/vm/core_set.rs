//! The core set: the tests that every kernel has to pass before a change is taken.
//!
//! A whole run in an emulated machine takes most of an hour. These are the ones that tell
//! most about a *kernel* for their time: whether its verifier takes every program, whether
//! every hook does what the agent builds on, and what its socket maps do.
//!
//! An emulated machine takes some ten seconds of a processor to start one agent, most of them
//! to read the kernel's BTF. So a test that starts one has to find out what no other here does.

/// Each is a part of names, as the test runner takes it.
pub(super) const TESTS: &[&str] = &[
    // The verifier, the helpers, the self-test of splicing.
    "check::this_machine_can_run_the_agent",
    "check::the_programs_of_others_are_named",
    // Listeners that come and go, before and after the agent; settings that change; an
    // agent that ends.
    "lifecycle::a_listener_that_is_closed_leaves_the_others_of_its_group",
    "lifecycle::a_listener_that_is_closed_leaves_the_others_that_listened_before_the_agent",
    "lifecycle::a_proxy_that_restarts_is_followed",
    "lifecycle::enrolling_again_replaces_the_settings",
    "lifecycle::an_agent_that_ends_takes_everything_with_it",
    // Verdicts and original destinations beside iptables' own: IPv4, IPv6 and mapped
    // addresses, outbound, inbound and within the pod, ports and ranges in and out.
    "differential::every_owner_from_every_source_to_every_destination",
    // connect(), bind() and getsockopt() where kernels differ.
    "sockets::bound::a_source_port_stays",
    "sockets::ports::an_application_is_restarted_while_the_proxy_has_callers",
    "sockets::connecting::data_in_the_syn_goes_to_the_proxy_by_msg_fastopen",
    "sockets::options::the_original_destination_is_told_into_any_buffer_that_holds_it",
    // Atomic instructions, as each processor has them.
    "fail_closed::outbound::handshakes_that_share_a_slot_reach_the_proxy_each_with_its_destination",
    // The owner, which is read from the kernel's structures.
    "owner::the_owner_of_a_socket_is_who_opened_it",
    // Excluded interfaces, and addresses that change.
    "network::what_goes_through_an_excluded_interface_is_direct",
    "network::an_address_that_is_added_is_the_pods_own_until_it_is_removed",
    // DNS over UDP.
    "dns::sockets::an_answer_comes_from_the_server_that_was_asked",
    "dns::verdicts::an_excluded_port_53_is_left_alone",
    // TLS in the kernel, which goes by TCP.
    "semantics::layers::tls_in_the_kernel",
    // Splicing: bytes that arrive whole and in order, and no more of them than there is
    // room for.
    "splice::order::what_was_sent_before_the_connection_is_spliced_comes_first",
    "splice::slow_reader::it_holds_no_more_than_its_buffer_and_reads_on_without_loss",
    "splice::slow_reader::it_may_keep_sending_meanwhile",
    "splice::slow_reader::what_it_has_offered_to_tcp_it_has_room_for",
    // How the kernel counts the calls on a member of a socket map.
    "splice::upheaval::what_is_about_to_be_given_outlives_the_agent",
    // A machine behind the pod: the programs at tc.
    "virtual::a_machines_connections_reach_the_proxy_as_with_rules",
    // Leaving a memory cgroup, here of version 2.
    "memory::it_is_nobodys_beside_an_agent_in_a_container",
    // Pinned links, which the next agent takes over.
    "upgrade::an_agent_that_is_killed_leaves_no_gap",
];
