//! The API server, asked from a test: one call at a time, with objects as JSON.

use std::path::Path;

use kube::{
    Client, Config,
    api::{
        ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams,
    },
    config::AuthInfo,
};
use serde_json::Value;
use shunt_tests::deadline::wait_until;
use tokio::runtime::{Builder, Runtime};

/// Who applies objects, for the API server.
const MANAGER: &str = "tests";

/// A connection to the API server.
pub(crate) struct Api {
    runtime: Runtime,
    client: Client,
}

impl Api {
    /// One to `server`, which shows a certificate of the authority in the file
    /// `authority`, as the one who has `token`. Nothing is asked yet.
    ///
    /// # Panics
    ///
    /// When the file is not there within the deadline: the API server writes it.
    pub(crate) fn connect(server: &str, authority: &Path, token: &str) -> Self {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let client = wait_until("the API server's certificate", || {
            let mut config = Config::new(server.parse().expect("a URL"));
            config.root_cert_file = Some(authority.to_owned());
            config.auth_info = AuthInfo {
                token: Some(token.to_owned().into()),
                ..AuthInfo::default()
            };
            runtime
                .block_on(async { Client::try_from(config) })
                .map_err(in_words)
        });
        Self { runtime, client }
    }

    /// The object, or why there is none.
    pub(crate) fn get(
        &self,
        version: &str,
        kind: &str,
        namespace: Option<&str>,
        name: &str,
    ) -> Result<Value, String> {
        let api = self.of_kind(version, kind, namespace);
        let object = self.runtime.block_on(api.get(name)).map_err(in_words)?;
        Ok(to_json(&object))
    }

    /// All objects of a kind in a namespace, or in all.
    pub(crate) fn list(
        &self,
        version: &str,
        kind: &str,
        namespace: Option<&str>,
    ) -> Result<Vec<Value>, String> {
        let api = self.of_kind(version, kind, namespace);
        let list = self
            .runtime
            .block_on(api.list(&ListParams::default()))
            .map_err(in_words)?;
        Ok(list.items.iter().map(to_json).collect())
    }

    /// Makes the object, or changes it to be so (server-side apply).
    ///
    /// # Panics
    ///
    /// When the API server refuses.
    #[track_caller]
    pub(crate) fn apply(&self, object: &Value) {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
        let (Some(version), Some(kind), Some(name)) =
            (text("/apiVersion"), text("/kind"), text("/metadata/name"))
        else {
            panic!("no object of Kubernetes: {object}");
        };
        let api = self.of_kind(version, kind, text("/metadata/namespace"));
        let parameters = PatchParams::apply(MANAGER).force();
        // One that has just started asks to be asked again.
        wait_until("the API server to be up to it", || {
            let patch = Patch::Apply(object);
            match self.runtime.block_on(api.patch(name, &parameters, &patch)) {
                Ok(_) => Ok(()),
                Err(kube::Error::Api(status)) if status.reason == "ServerTimeout" => {
                    Err(status.message)
                }
                Err(error) => panic!("cannot apply {object}: {}", in_words(error)),
            }
        });
    }

    /// Wants the object to be gone, after `grace` seconds for a pod; it may have
    /// gone already.
    ///
    /// # Panics
    ///
    /// When the API server refuses.
    pub(crate) fn delete(
        &self,
        version: &str,
        kind: &str,
        namespace: Option<&str>,
        name: &str,
        grace: u32,
    ) {
        let api = self.of_kind(version, kind, namespace);
        let parameters = DeleteParams::default().grace_period(grace);
        match self.runtime.block_on(api.delete(name, &parameters)) {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => panic!("cannot delete {kind} {name}: {}", in_words(error)),
        }
    }

    fn of_kind(
        &self,
        version: &str,
        kind: &str,
        namespace: Option<&str>,
    ) -> kube::Api<DynamicObject> {
        let (group, version) = version.split_once('/').unwrap_or(("", version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        match namespace {
            Some(namespace) => {
                kube::Api::namespaced_with(self.client.clone(), namespace, &resource)
            }
            None => kube::Api::all_with(self.client.clone(), &resource),
        }
    }
}

/// Whether a node, or a pod with all of its containers, is ready.
pub(crate) fn is_ready(object: &Value) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    conditions
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

fn to_json(object: &DynamicObject) -> Value {
    serde_json::to_value(object).expect("it was JSON")
}

fn in_words(error: kube::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}
