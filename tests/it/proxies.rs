//! A site in a network whose only way out is a proxy.

use transport::testing::proxy::{Speaks, TestProxy};

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::{Scratch, data, limit, secs, wait_for};

/// A name that only the proxy resolves.
const HUB: &str = "hub.factory.invalid:7443";

#[test]
fn a_site_joins_and_receives_through_a_proxy_and_says_what_is_wrong_with_it() {
    let _limit = limit(secs(150));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let names = [(HUB, hub.quic)];
    let proxy = TestProxy::start(Speaks::Http, Some(("factory", "open sesame")), &names);
    let password = scratch.join("proxy-password");
    data::write(&password, b"open sesame\n");
    data::chmod(&password, 0o600);
    let spec = SiteSpec {
        more: "[line]\ntransport = \"tcp\"",
        ..SiteSpec::default()
    };
    let mut site = Site::new(scratch.path(), &hub, "chengdu", &spec);
    let keys = format!(
        "address = \"{HUB}\"\nproxy = \"http://factory@{}\"\nproxy_password_file = \"{}\"",
        proxy.address(),
        password.display()
    );
    site.edit_config(&format!("address = \"{}\"", hub.quic), &keys);
    let token = hub.token("chengdu", &[]);
    site.cli(&["join", "--hub", HUB, "--token", &token])
        .expect(0);
    site.start();
    hub.wait_online("chengdu", true, secs(30));
    let source = scratch.join("source");
    data::model(&source, 1 << 20);
    hub.publish(&source, "model/m:v1", &[]);
    hub.deliver_and_wait("model/m:v1", "chengdu", secs(60));
    let said = site.cli(&["doctor"]).out;
    let through = format!("through the proxy http://{}", proxy.address());
    assert!(said.contains(&through), "{said}");
    assert!(proxy.opened() >= 2, "the join and the connection");

    // The password is changed at the proxy, then the proxy ends.
    site.stop();
    data::write(&password, b"wrong\n");
    let doctor_says = |site: &Site, what: &str| {
        wait_for(&format!("doctor says {what:?}"), secs(40), || {
            let said = site.cli(&["doctor"]);
            (said.out.contains(what) && !said.out.contains("open sesame")).then_some(())
        });
    };
    site.start_alive();
    doctor_says(&site, "rejected the user name or the password (407)");
    let address = proxy.address();
    site.stop();
    drop(proxy);
    site.start_alive();
    doctor_says(
        &site,
        &format!("the proxy http://{address} cannot be reached: Connection refused"),
    );
}
