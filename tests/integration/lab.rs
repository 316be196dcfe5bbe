//! What most tests begin with: a pod, an application in it, and a host outside.

use shunt_tests::{Agent, Node, Owner, Pod, Probe, Responder, mesh::ISTIO_DEFAULTS, probe};

/// The application's port, and that of the host outside.
pub(crate) const PORT: u16 = 80;

/// A pod that an agent may redirect, without a proxy yet.
pub(crate) struct Lab {
    outside: Responder,
    _application: Responder,
    pub(crate) pod: Pod,
    pub(crate) node: Node,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let node = Node::new();
        let pod = node.pod("pod");
        Self {
            outside: Responder::start(node.netns(), Owner::APP, &[PORT]),
            _application: Responder::start(pod.netns(), Owner::APP, &[PORT]),
            pod,
            node,
        }
    }

    /// The host outside.
    pub(crate) fn outside(&self) -> &Responder {
        &self.outside
    }

    /// An agent for this lab, which has enrolled nothing yet.
    pub(crate) fn agent(&self) -> Agent {
        Agent::start(self.node.cgroup())
    }

    /// An agent that has enrolled the pod as Istio does.
    pub(crate) fn enrolled(&self) -> Agent {
        let agent = self.agent();
        agent.enroll(self.pod.netns(), &ISTIO_DEFAULTS);
        agent
    }

    /// A proxy for the pod: it answers itself.
    pub(crate) fn proxy(&self) -> Responder {
        Responder::start(self.pod.netns(), Owner::PROXY, &[15001, 15006])
    }

    /// Who answers when the application calls the host outside.
    pub(crate) fn outbound(&self) -> String {
        let call = Probe::new(Owner::APP, (Node::OUTSIDE, PORT));
        probe(self.pod.netns(), &call).outcome.to_string()
    }

    /// Who answers when the host outside calls the application.
    pub(crate) fn inbound(&self) -> String {
        let call = Probe::new(Owner::APP, (self.pod.ip(), PORT));
        probe(self.node.netns(), &call).outcome.to_string()
    }

    /// Who answers when the proxy calls its own application at the pod's
    /// address.
    pub(crate) fn hairpin(&self) -> String {
        let call = Probe::new(Owner::PROXY, (self.pod.ip(), PORT));
        probe(self.pod.netns(), &call).outcome.to_string()
    }

    #[track_caller]
    pub(crate) fn assert_redirected(&self) {
        let seen = [self.outbound(), self.inbound(), self.hairpin()];
        assert_eq!(seen, ["pod:15001", "pod:15006", "pod:15006"]);
    }

    #[track_caller]
    pub(crate) fn assert_refused(&self) {
        let seen = [self.outbound(), self.inbound(), self.hairpin()];
        assert_eq!(seen, ["refused"; 3]);
    }

    #[track_caller]
    pub(crate) fn assert_direct(&self) {
        let seen = [self.outbound(), self.inbound(), self.hairpin()];
        assert_eq!(seen, ["node:80", "pod:80", "pod:80"]);
    }
}
