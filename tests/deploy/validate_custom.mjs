// Custom resources against their published schemas: one JSON object a line in, one complaint a line out.
import * as keda from "@kubernetes-models/keda/keda.sh/v1alpha1";
import * as gateway from "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1";
import * as certificates from "@kubernetes-models/cert-manager/cert-manager.io/v1";
import * as prometheus from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";
import { readFileSync } from "node:fs";

const kinds = { ...prometheus, ...keda, ...gateway, ...certificates };
for (const line of readFileSync(0, "utf8").trim().split("\n")) {
  const { apiVersion, kind, ...rest } = JSON.parse(line);
  const known = kinds[kind];
  if (!known || known.apiVersion !== apiVersion) console.log(`${kind}: no schema for ${apiVersion}`);
  else {
    try {
      new known(rest).validate();
    } catch (error) {
      console.log(`${kind} ${rest.metadata?.name}: ${error.message}`);
    }
  }
}
