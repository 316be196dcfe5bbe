//! Brings what is enrolled in line with what the pods of the node ask for.
//!
//! The plan is made anew each time, from what is: what the index knows, what is in
//! force, and which pods have processes. So it does not matter what was missed, or
//! in which order things came: an agent that starts late, a CNI plugin that was
//! quicker, an annotation that has changed.
//!
//! A pod that the API no longer has keeps its redirection for as long as it has a
//! process: after `kubectl delete --force` its containers run on, and their
//! connections must not go around the mesh.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use shunt_abi::NetnsCookie;

use crate::{
    containers::{Found, Sandbox, scan},
    node::{EnrolRequest, Enrolled, NodeHandle},
    observe::events::{PodEvents, Reason},
    pods::{Decision, Event, Known, PodRef, PodsHandle, Resolvers, View},
    settings::Settings,
};

/// How long after a pass the next one is made when nothing has changed: it finds
/// what nobody told of.
const PERIOD: Duration = Duration::from_secs(60);

/// How long after something has changed a pass begins: pods come in groups.
const SETTLE: Duration = Duration::from_millis(50);

/// How long after a pass that failed as a whole the next one begins, at the earliest.
const FAILURE_PAUSE: Duration = Duration::from_secs(2);

/// How long after its first failure a pod is tried again; it doubles each time.
const FIRST_RETRY: Duration = Duration::from_millis(200);

/// The longest pause between two attempts at a pod whose sandbox is not there. Where
/// the CNI plugin is installed it is enrolled before that.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// The longest pause between two attempts at a pod that could not be enrolled.
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// What has to be done.
#[derive(Clone, Debug)]
enum Step {
    /// Enrol a namespace, or replace its settings.
    Enrol(Box<EnrolRequest>),
    /// The pod is to be redirected, and its sandbox is not there (yet).
    Wait(PodRef),
    /// The pod is not to be redirected any more.
    Unenrol(PodRef),
}

impl Step {
    fn pod(&self) -> Option<&PodRef> {
        match self {
            Self::Enrol(request) => request.pod.as_ref(),
            Self::Wait(pod) | Self::Unenrol(pod) => Some(pod),
        }
    }
}

/// Runs for ever.
pub(crate) async fn run(pods: PodsHandle, node: NodeHandle, proc: PathBuf, events: PodEvents) {
    let mut reconciler = Reconciler {
        pods,
        node,
        proc,
        events,
        retries: Retries::default(),
    };
    let mut complained = false;
    loop {
        let done = reconciler.pass().await;
        if let Err(error) = &done {
            reconciler.pods.state().errors.scan.inc();
            if !complained {
                tracing::warn!("cannot look at the pods of the node: {error:#}");
            }
            tokio::time::sleep(FAILURE_PAUSE).await;
        }
        complained = done.is_err();
        let wait = reconciler.retries.wait(Instant::now());
        reconciler.pods.index().changed(wait).await;
        tokio::time::sleep(SETTLE).await;
    }
}

struct Reconciler {
    pods: PodsHandle,
    node: NodeHandle,
    proc: PathBuf,
    events: PodEvents,
    retries: Retries,
}

impl Reconciler {
    async fn pass(&mut self) -> Result<()> {
        // In this order: the plugin tells the index of a pod before it enrols it, so
        // whatever is enrolled here is in the view, unless it is gone.
        let enrolled = self.node.enrolled().await?;
        let view = self.pods.index().view().await?;
        self.ask_for(&view.doubtful).await;
        if view.pods.is_empty() && !view.synced {
            return Ok(());
        }
        let found = look(self.proc.clone(), wanted(&view)).await?;
        let steps = plan(&view, &enrolled, &found, self.pods.resolvers());
        self.retries.keep(&view, &steps);
        for step in steps {
            self.take(step).await;
        }
        if view.synced {
            self.pods.state().set_synced();
        }
        Ok(())
    }

    /// Asks the API for pods that may be gone.
    async fn ask_for(&self, doubtful: &[PodRef]) {
        for pod in doubtful {
            let event = match self.pods.get(pod).await {
                Ok(Some(_)) => Event::Present(pod.clone()),
                Ok(None) => Event::Absent(pod.clone()),
                Err(error) => {
                    tracing::debug!(pod = %pod, "it may be gone: {error:#}");
                    return;
                }
            };
            self.pods.index().tell(event).await;
        }
    }

    async fn take(&mut self, step: Step) {
        let Some(pod) = step.pod().cloned() else {
            return;
        };
        let now = Instant::now();
        if !self.retries.is_due(&pod, now) {
            return;
        }
        match step {
            Step::Wait(_) => self.retries.failed(&pod, now, LONGEST_WAIT),
            Step::Unenrol(_) => {
                tracing::info!(pod = %pod, uid = pod.uid, "is not redirected any more");
                if let Err(error) = self.node.unenrol_pod(pod.uid.clone()).await {
                    tracing::warn!(pod = %pod, "cannot unenrol: {error:#}");
                }
            }
            Step::Enrol(request) => match self.node.enrol(*request).await {
                Ok(()) => {}
                Err(error) => self.not_enrolled(&pod, &error),
            },
        }
    }

    fn not_enrolled(&mut self, pod: &PodRef, error: &anyhow::Error) {
        self.pods.state().errors.enrol.inc();
        tracing::warn!(pod = %pod, uid = pod.uid, "cannot be enrolled: {error:#}");
        self.retries.failed(pod, Instant::now(), LONGEST_RETRY);
        // The first attempt may have met a pod that was just ending.
        if self.retries.attempts(pod) > 1 {
            let text = format!("shunt cannot redirect this pod, and tries again: {error:#}");
            self.events.say(pod, Reason::NotEnrolled, text);
        }
    }
}

async fn look(proc: PathBuf, wanted: BTreeSet<String>) -> Result<Found> {
    tokio::task::spawn_blocking(move || scan(Path::new(&proc), &wanted))
        .await
        .context("the look at the processes panicked")?
}

/// The uids of the pods that are to be redirected.
fn wanted(view: &View) -> BTreeSet<String> {
    view.pods
        .iter()
        .filter(|known| matches!(known.decision, Decision::Redirect(_)))
        .map(|known| known.pod.uid.clone())
        .collect()
}

/// What has to be done so that what is enrolled is what is wanted.
fn plan(view: &View, enrolled: &[Enrolled], found: &Found, resolvers: &Resolvers) -> Vec<Step> {
    let known: BTreeMap<&str, &Known> = view
        .pods
        .iter()
        .map(|known| (known.pod.uid.as_str(), known))
        .collect();
    let gone = enrolled.iter().filter_map(|enrolled| {
        let pod = enrolled.pod.as_ref()?;
        let ends = match known.get(pod.uid.as_str()).map(|known| &known.decision) {
            Some(Decision::Leave(_)) => true,
            Some(Decision::Redirect(_) | Decision::Refuse(_)) => false,
            None => view.synced && !found.running.contains(&pod.uid),
        };
        ends.then(|| Step::Unenrol(pod.clone()))
    });
    // Where it is seen whose namespace it is, that counts.
    let seen: BTreeSet<NetnsCookie> = found.sandboxes.values().map(|one| one.cookie).collect();
    let here = view.pods.iter().flat_map(|known| {
        let Decision::Redirect(settings) = &known.decision else {
            return Vec::new();
        };
        let pod = Pod { known, settings };
        match found.sandboxes.get(&known.pod.uid) {
            Some(sandbox) => pod.in_sandbox(sandbox, enrolled, resolvers),
            None => pod.without_process(enrolled, &seen),
        }
    });
    gone.chain(here).collect()
}

/// A pod that is to be redirected.
struct Pod<'a> {
    known: &'a Known,
    settings: &'a Settings,
}

impl Pod<'_> {
    fn in_sandbox(
        &self,
        sandbox: &Sandbox,
        enrolled: &[Enrolled],
        resolvers: &Resolvers,
    ) -> Vec<Step> {
        let expected = match &sandbox.resolvers {
            Some(read) => read.clone(),
            None => resolvers.of(&self.known.dns),
        };
        let here = enrolled.iter().find(|one| one.cookie == sandbox.cookie);
        if here.is_some_and(|here| self.is_in_force(here, &expected)) {
            return Vec::new();
        }
        vec![self.enrol(&sandbox.netns, expected)]
    }

    /// It has no process yet; where the plugin has enrolled it, its namespace is
    /// known.
    fn without_process(&self, enrolled: &[Enrolled], seen: &BTreeSet<NetnsCookie>) -> Vec<Step> {
        let mut own = enrolled
            .iter()
            .filter(|one| one.pod.as_ref() == Some(&self.known.pod) && !seen.contains(&one.cookie))
            .peekable();
        if own.peek().is_none() {
            return vec![Step::Wait(self.known.pod.clone())];
        }
        own.filter(|one| one.settings != *self.settings)
            .map(|one| self.enrol(&one.netns, one.resolvers.clone()))
            .collect()
    }

    fn is_in_force(&self, here: &Enrolled, resolvers: &[std::net::IpAddr]) -> bool {
        here.pod.as_ref() == Some(&self.known.pod)
            && here.settings == *self.settings
            // Nobody asks for them otherwise.
            && (!self.settings.redirect_dns || here.resolvers == resolvers)
    }

    fn enrol(&self, netns: &Path, resolvers: Vec<std::net::IpAddr>) -> Step {
        Step::Enrol(Box::new(EnrolRequest {
            netns: netns.to_owned(),
            resolvers,
            settings: self.settings.clone(),
            pod: Some(self.known.pod.clone()),
        }))
    }
}

/// The pods that have to be tried again, by uid.
#[derive(Default)]
struct Retries(BTreeMap<String, Retry>);

struct Retry {
    attempts: u32,
    due: Instant,
    /// What was tried.
    decision: Option<Decision>,
}

impl Retries {
    fn is_due(&self, pod: &PodRef, now: Instant) -> bool {
        self.0.get(&pod.uid).is_none_or(|retry| retry.due <= now)
    }

    fn attempts(&self, pod: &PodRef) -> u32 {
        self.0.get(&pod.uid).map_or(0, |retry| retry.attempts)
    }

    fn failed(&mut self, pod: &PodRef, now: Instant, longest: Duration) {
        let retry = self.0.entry(pod.uid.clone()).or_insert(Retry {
            attempts: 0,
            due: now,
            decision: None,
        });
        let pause = FIRST_RETRY.saturating_mul(1 << retry.attempts.min(16));
        retry.attempts += 1;
        retry.due = now + pause.min(longest);
    }

    /// Forgets pods for which there is nothing to do any more; one that asks for
    /// something else now is tried at once.
    fn keep(&mut self, view: &View, steps: &[Step]) {
        let left: BTreeSet<&str> = steps
            .iter()
            .filter_map(|step| Some(step.pod()?.uid.as_str()))
            .collect();
        let decisions: BTreeMap<&str, &Decision> = view
            .pods
            .iter()
            .map(|known| (known.pod.uid.as_str(), &known.decision))
            .collect();
        self.0.retain(|uid, retry| {
            let now = decisions.get(uid.as_str()).copied();
            let is_same = retry.decision.is_none() || retry.decision.as_ref() == now;
            retry.decision = now.cloned();
            left.contains(uid.as_str()) && is_same
        });
    }

    /// How long until the first of them is due, or the next pass is made anyway.
    fn wait(&self, now: Instant) -> Duration {
        let due = self.0.values().map(|retry| retry.due).min();
        let until = due.map(|due| due.saturating_duration_since(now));
        until.unwrap_or(PERIOD).min(PERIOD)
    }
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, sync::Arc};

    use proptest::prelude::*;

    use super::*;
    use crate::{
        pods::{Dns, DnsPolicy, NotRedirected},
        settings::tests::settings,
    };

    fn pod(uid: u8) -> PodRef {
        PodRef {
            namespace: "shop".to_owned(),
            name: format!("web-{uid}"),
            uid: uid.to_string(),
        }
    }

    fn of(flags: &str) -> Settings {
        settings(flags).expect("good flags")
    }

    fn redirect(flags: &str) -> Decision {
        Decision::Redirect(Arc::new(of(flags)))
    }

    fn refuse() -> Decision {
        Decision::Refuse(Box::new(settings("-o x").expect_err("no port")))
    }

    const ISTIO: &str = "--mesh istio";

    fn view(pods: &[(u8, Decision)]) -> View {
        View {
            pods: pods
                .iter()
                .map(|(uid, decision)| Known {
                    pod: pod(*uid),
                    decision: decision.clone(),
                    dns: Dns {
                        policy: DnsPolicy::None,
                        nameservers: vec!["192.0.2.1".to_owned()],
                    },
                })
                .collect(),
            doubtful: Vec::new(),
            synced: true,
        }
    }

    fn enrolled(uid: u8, cookie: u64, flags: &str) -> Enrolled {
        Enrolled {
            netns: format!("/run/netns/{cookie}").into(),
            cookie,
            settings: of(flags),
            resolvers: Vec::new(),
            pod: Some(pod(uid)),
        }
    }

    /// Pods that run, each in the namespace of this cookie.
    fn running(pods: &[(u8, u64)]) -> Found {
        Found {
            running: pods.iter().map(|(uid, _)| uid.to_string()).collect(),
            sandboxes: pods
                .iter()
                .map(|&(uid, cookie)| {
                    let sandbox = Sandbox {
                        netns: format!("/proc/{cookie}/ns/net").into(),
                        cookie,
                        resolvers: None,
                    };
                    (uid.to_string(), sandbox)
                })
                .collect(),
        }
    }

    /// The plan, in short.
    fn planned(view: &View, enrolled: &[Enrolled], found: &Found) -> Vec<String> {
        let resolvers = Resolvers::new(Path::new("/nowhere"));
        let steps = plan(view, enrolled, found, &resolvers);
        steps.iter().map(short).collect()
    }

    fn short(step: &Step) -> String {
        match step {
            Step::Wait(pod) => format!("wait {}", pod.uid),
            Step::Unenrol(pod) => format!("unenrol {}", pod.uid),
            Step::Enrol(request) => {
                let uid = request.pod.as_ref().map_or("nobody", |pod| &pod.uid);
                format!("enrol {uid} at {}", request.netns.display())
            }
        }
    }

    const NOTHING: [&str; 0] = [];

    #[test]
    fn an_agent_that_starts_late_enrols_what_runs() {
        let view = view(&[(1, redirect(ISTIO)), (2, redirect(ISTIO)), (3, refuse())]);
        let found = running(&[(1, 11), (3, 13), (9, 19)]);
        assert_eq!(
            planned(&view, &[], &found),
            ["enrol 1 at /proc/11/ns/net", "wait 2"]
        );
    }

    #[test]
    fn what_is_as_it_should_be_is_left_alone() {
        let pods = view(&[(1, redirect(ISTIO)), (2, redirect(ISTIO))]);
        let own = [enrolled(1, 11, ISTIO), enrolled(2, 12, ISTIO)];
        // The second one was enrolled by the plugin, and has no process yet.
        assert_eq!(planned(&pods, &own, &running(&[(1, 11)])), NOTHING);
    }

    #[test]
    fn what_has_changed_is_replaced_where_it_is() {
        let pods = view(&[(1, redirect("--mesh istio -o 3306")), (2, redirect(ISTIO))]);
        let own = [enrolled(1, 11, ISTIO), enrolled(2, 12, ISTIO)];
        assert_eq!(
            planned(&pods, &own, &running(&[(1, 11), (2, 12)])),
            ["enrol 1 at /proc/11/ns/net"]
        );
        // Without a process, where the plugin said.
        assert_eq!(
            planned(&pods, &own, &running(&[])),
            ["enrol 1 at /run/netns/11"]
        );
        // A sandbox that was made anew has another namespace.
        assert_eq!(
            planned(&pods, &own, &running(&[(1, 11), (2, 22)])),
            ["enrol 1 at /proc/11/ns/net", "enrol 2 at /proc/22/ns/net"]
        );
    }

    #[test]
    fn a_namespace_that_was_enrolled_by_hand_becomes_the_pods() {
        let pods = view(&[(1, redirect(ISTIO))]);
        let mut by_hand = enrolled(1, 11, ISTIO);
        by_hand.pod = None;
        let own = [by_hand];
        assert_eq!(
            planned(&pods, &own, &running(&[(1, 11)])),
            ["enrol 1 at /proc/11/ns/net"]
        );
        // It is nobody else's business.
        assert_eq!(planned(&view(&[]), &own, &running(&[])), NOTHING);
        let left = view(&[(1, Decision::Leave(NotRedirected::NoSidecar))]);
        assert_eq!(planned(&left, &own, &running(&[(1, 11)])), NOTHING);
    }

    #[test]
    fn who_is_not_wanted_any_more_goes() {
        let own = [enrolled(1, 11, ISTIO)];
        let left = view(&[(1, Decision::Leave(NotRedirected::InterceptionOff))]);
        assert_eq!(planned(&left, &own, &running(&[(1, 11)])), ["unenrol 1"]);
        // What was in force stays when the new settings make no sense.
        assert_eq!(
            planned(&view(&[(1, refuse())]), &own, &running(&[(1, 11)])),
            NOTHING
        );
        // Deleted: as soon as it has no process any more.
        let mut nobody = view(&[]);
        assert_eq!(planned(&nobody, &own, &running(&[(1, 11)])), NOTHING);
        assert_eq!(planned(&nobody, &own, &running(&[])), ["unenrol 1"]);
        // The API has been away since the start: nothing is known to be gone.
        nobody.synced = false;
        assert_eq!(planned(&nobody, &own, &running(&[])), NOTHING);
    }

    #[test]
    fn resolvers_matter_when_dns_is_captured() {
        let ip = |text: &str| text.parse::<IpAddr>().expect("a literal");
        let mut found = running(&[(1, 11)]);
        for (flags, replaced) in [(ISTIO, false), ("--mesh istio --redirect-dns", true)] {
            let pods = view(&[(1, redirect(flags))]);
            let own = [enrolled(1, 11, flags)];
            let steps = planned(&pods, &own, &found);
            assert_eq!(!steps.is_empty(), replaced, "{flags}");
        }
        let pods = view(&[(1, redirect("--mesh istio --redirect-dns"))]);
        let resolvers = Resolvers::new(Path::new("/nowhere"));
        let asked = |found: &Found| match &plan(&pods, &[], found, &resolvers)[..] {
            [Step::Enrol(request)] => request.resolvers.clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!(asked(&found), [ip("192.0.2.1")]);
        // What the pod really has is better than what it should have.
        if let Some(sandbox) = found.sandboxes.get_mut("1") {
            sandbox.resolvers = Some(vec![ip("192.0.2.2")]);
        }
        assert_eq!(asked(&found), [ip("192.0.2.2")]);
    }

    #[test]
    fn failures_are_tried_again_less_and_less() {
        let (start, longest) = (Instant::now(), LONGEST_RETRY);
        let mut retries = Retries::default();
        let pods = view(&[(1, redirect(ISTIO))]);
        let steps = [Step::Wait(pod(1))];
        assert!(retries.is_due(&pod(1), start));
        assert_eq!(retries.wait(start), PERIOD);
        let mut before = Duration::ZERO;
        for _ in 0..40 {
            retries.failed(&pod(1), start, longest);
            retries.keep(&pods, &steps);
            let wait = retries.wait(start);
            assert!(
                wait <= longest && (wait > before || wait == longest),
                "{wait:?}"
            );
            assert!(!retries.is_due(&pod(1), start));
            assert!(retries.is_due(&pod(1), start + wait));
            assert!(retries.is_due(&pod(2), start));
            before = wait;
        }
        assert_eq!(before, longest);
        // Other settings are tried at once.
        retries.keep(&view(&[(1, redirect("--mesh istio -o 1"))]), &steps);
        assert!(retries.is_due(&pod(1), start));
        // What was done meanwhile by somebody else keeps nobody awake.
        retries.failed(&pod(1), start, longest);
        retries.keep(&pods, &[]);
        assert_eq!(retries.wait(start), PERIOD);
    }

    fn decision() -> impl Strategy<Value = Decision> {
        prop_oneof![
            Just(redirect(ISTIO)),
            Just(redirect("--mesh istio -o 1")),
            Just(Decision::Leave(NotRedirected::NoSidecar)),
            Just(refuse()),
        ]
    }

    proptest! {
        /// Once the steps are taken, nothing is left to do, and everybody has what
        /// is wanted.
        #[test]
        fn a_plan_leads_to_what_is_wanted(
            pods in prop::collection::btree_map(0..6_u8, decision(), 0..6),
            own in prop::collection::btree_map(10..16_u64, 0..8_u8, 0..6),
            alive in prop::collection::btree_map(0..8_u8, 10..16_u64, 0..8),
        ) {
            let view = view(&pods.clone().into_iter().collect::<Vec<_>>());
            let cookies: BTreeMap<u64, u8> = alive.iter().map(|(uid, cookie)| (*cookie, *uid)).collect();
            // A namespace is of one pod.
            let alive: Vec<(u8, u64)> = cookies.iter().map(|(cookie, uid)| (*uid, *cookie)).collect();
            let found = running(&alive);
            let mut now: Vec<Enrolled> =
                own.iter().map(|(cookie, uid)| enrolled(*uid, *cookie, ISTIO)).collect();
            let resolvers = Resolvers::new(Path::new("/nowhere"));
            for step in plan(&view, &now, &found, &resolvers) {
                match step {
                    Step::Wait(_) => {}
                    Step::Unenrol(pod) => now.retain(|one| one.pod.as_ref() != Some(&pod)),
                    Step::Enrol(request) => {
                        let path = request.netns.display().to_string();
                        let cookie = path.split('/').find_map(|part| part.parse().ok()).expect("a cookie");
                        now.retain(|one| one.cookie != cookie);
                        now.push(Enrolled {
                            netns: request.netns,
                            cookie,
                            settings: request.settings,
                            resolvers: request.resolvers,
                            pod: request.pod,
                        });
                    }
                }
            }
            let left = planned(&view, &now, &found);
            prop_assert!(left.iter().all(|step| step.starts_with("wait")), "{left:?}");
            for (uid, cookie) in alive {
                let here = now.iter().find(|one| one.cookie == cookie && one.pod == Some(pod(uid)));
                match pods.get(&uid) {
                    Some(Decision::Redirect(settings)) => {
                        prop_assert_eq!(here.map(|one| &one.settings), Some(&**settings));
                    }
                    Some(Decision::Leave(_)) => prop_assert!(here.is_none()),
                    Some(Decision::Refuse(_)) | None => {}
                }
            }
        }
    }
}
