{{/* What all pods have in common. */}}

{{- define "whisper-serve.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.securityContext.runAsUser | int64 }}
runAsGroup: {{ .Values.securityContext.runAsGroup | int64 }}
fsGroup: {{ .Values.securityContext.fsGroup | int64 }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "whisper-serve.containerSecurity" -}}
runAsNonRoot: true
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Where a pod may run. root, component, config (nodeSelector, tolerations, affinity, priorityClassName). */}}
{{- define "whisper-serve.scheduling" -}}
{{- with .config.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .config.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .config.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .config.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .config.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.topologySpread }}
{{- if and .enabled (ne $.component "head") }}
topologySpreadConstraints:
  {{- range .topologyKeys }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: {{ $.root.Values.topologySpread.whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "whisper-serve.selectorLabels" $.root | nindent 8 }}
        app.kubernetes.io/component: {{ $.component }}
    {{- if ne $.component "controller" }}
    # an old cluster's pods and a new one's are spread each by themselves
    matchLabelKeys: [ray.io/cluster]
    {{- end }}
  {{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/*
The template of a Ray pod. root; component: head, api or a stage group's name; stages: those of a stage group; config: its
section of the values; scheduling: where its nodes are described; gpus: of the container.

KubeRay adds the command, RAY_ADDRESS and its like, the token of authOptions, and to the head the autoscaler.
*/}}
{{- define "whisper-serve.rayPod" -}}
{{- $root := .root -}}
{{- $values := .root.Values -}}
{{- $head := eq .component "head" -}}
metadata:
  # none that changes with the chart's version: a change of the template is a new cluster
  labels:
    {{- include "whisper-serve.selectorLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
  {{- with .scheduling.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "whisper-serve.fullname" $root }}-{{ ternary "head" "worker" $head }}
  # only the autoscaler needs a token: it has a volume of its own
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add $values.drain.timeoutSeconds 30 }}
  securityContext:
    {{- include "whisper-serve.podSecurity" $root | nindent 4 }}
  {{- with $values.imagePullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with include "whisper-serve.scheduling" (dict "root" $root "component" .component "config" .scheduling) | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- if and .stages $values.weights.image }}
  initContainers:
    - name: weights
      image: {{ $values.weights.image }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      command: [sh, -c, 'cp -R "$0"/. /models/']
      args: [{{ $values.weights.imagePath | quote }}]
      securityContext:
        {{- include "whisper-serve.containerSecurity" $root | nindent 8 }}
      resources: {requests: {cpu: 100m, memory: 128Mi}, limits: {memory: 1Gi}}
      volumeMounts:
        - {name: weights, mountPath: /models}
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" $head }}
      image: {{ include "whisper-serve.image" $root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext:
        {{- include "whisper-serve.containerSecurity" $root | nindent 8 }}
      ports:
        {{- if $head }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: as-metrics, containerPort: 44217}
        - {name: dash-metrics, containerPort: 44227}
        {{- end }}
        - {name: serve, containerPort: 8000}
        - {name: metrics, containerPort: 8080}
      env:
        # all that is written goes to /tmp, a volume
        - {name: HOME, value: /tmp}
        - {name: XDG_CACHE_HOME, value: /tmp/cache}
        - {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ $values.drain.timeoutSeconds | quote }}}
        # as often as replicas report: the controller decides by these figures
        - {name: RAY_metrics_report_interval_ms, value: "1000"}
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        # Serve fills a pod before it takes the next, and empties one when replicas go: then the autoscaler removes it
        - {name: RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY, value: "1"}
        # OpenMP threads that wait for work sleep instead of spinning: replicas share the cores
        - {name: OMP_WAIT_POLICY, value: PASSIVE}
        {{- with $values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      livenessProbe:
        # raylet, and on the head GCS; a head that starts again after a failure takes minutes
        httpGet: {path: /api/healthz, port: 52365}
        initialDelaySeconds: 30
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 30
      readinessProbe:
        {{- if eq .component "api" }}
        # this pod's proxy, which is ready once the application's API has a replica in this cluster
        httpGet: {path: /-/healthz, port: 8000}
        {{- else }}
        httpGet: {path: /api/healthz, port: 52365}
        {{- end }}
        initialDelaySeconds: 10
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 3
      resources:
        {{- $resources := deepCopy .config.resources -}}
        {{- if .gpus -}}
        {{- $gpus := dict $values.stagePods.gpuResource (int .gpus) -}}
        {{- $_ := set $resources "limits" (merge $gpus (default dict $resources.limits)) -}}
        {{- $_ := set $resources "requests" (merge $gpus (default dict $resources.requests)) -}}
        {{- end -}}
        {{- toYaml $resources | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        {{- if and (eq .component "api") (include "whisper-serve.apiKeysSecret" $root) }}
        - {name: api-keys, mountPath: /etc/whisper-serve/api-keys, readOnly: true}
        {{- end }}
        {{- if and .stages (or $values.weights.existingClaim $values.weights.image) }}
        - {name: weights, mountPath: /models, readOnly: true}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: {{ $values.scratch.sizeLimit }}}
    - name: shm
      # what is not the object store's is for the stages' own shared memory
      emptyDir: {medium: Memory, sizeLimit: {{ add .config.objectStoreMiB 512 }}Mi}
    {{- if and (eq .component "api") (include "whisper-serve.apiKeysSecret" $root) }}
    - name: api-keys
      secret:
        secretName: {{ include "whisper-serve.apiKeysSecret" $root }}
        items: [{key: {{ ternary $values.apiKeys.key "keys" (ne $values.apiKeys.existingSecret "") }}, path: keys}]
        defaultMode: 0440
    {{- end }}
    {{- if .stages }}
    {{- if $values.weights.existingClaim }}
    - name: weights
      persistentVolumeClaim: {claimName: {{ $values.weights.existingClaim }}, readOnly: true}
    {{- else if $values.weights.image }}
    - name: weights
      emptyDir: {sizeLimit: {{ $values.weights.sizeLimit }}}
    {{- end }}
    {{- end }}
    {{- if and $head (ne $values.autoscaling.by "none") }}
    - name: autoscaler-token
      projected:
        sources:
          - serviceAccountToken: {path: token, expirationSeconds: 3607}
          - configMap:
              name: kube-root-ca.crt
              items: [{key: ca.crt, path: ca.crt}]
          - downwardAPI:
              items: [{path: namespace, fieldRef: {apiVersion: v1, fieldPath: metadata.namespace}}]
    {{- end }}
{{- end }}

{{/* What ray start is told beside the resources. */}}
{{- define "whisper-serve.rayStartParams" -}}
object-store-memory: {{ mul .objectStoreMiB 1048576 | quote }}
# in a volume that ends with the pod: recordings must not outlive it on a disk
object-spilling-directory: /tmp/spill
{{- end }}
