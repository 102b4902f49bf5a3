{{/* Names. The longest suffix is -controller-metrics; KubeRay takes 47 characters, and a letter first, for a RayService. */}}

{{- define "whisper-serve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "whisper-serve.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := .Values.fullnameOverride -}}
{{- if not $full -}}
{{- $full = ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- end -}}
{{- $full = $full | replace "." "-" -}}
{{- if not (regexMatch "^[a-z]" $full) -}}{{- $full = printf "w%s" $full -}}{{- end -}}
{{- /* two long names that begin alike must not become one */ -}}
{{- if gt (len $full) 40 -}}
{{- $full = printf "%s-%s" ($full | trunc 33 | trimSuffix "-") ($full | sha256sum | trunc 6) -}}
{{- end -}}
{{- $full -}}
{{- end }}

{{- define "whisper-serve.selectorLabels" -}}
app.kubernetes.io/name: {{ include "whisper-serve.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "whisper-serve.labels" -}}
{{ include "whisper-serve.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "whisper-serve.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ default $.Chart.AppVersion .tag }}{{- end -}}
{{- end -}}
{{- end }}

{{/* Names of secrets, the chart's own or those that exist. */}}

{{- define "whisper-serve.apiKeysSecret" -}}
{{- with .Values.apiKeys -}}
{{- if .existingSecret -}}{{ .existingSecret }}{{- else if .keys -}}{{ include "whisper-serve.fullname" $ }}-api-keys{{- end -}}
{{- end -}}
{{- end }}

{{- define "whisper-serve.rayTokenSecret" -}}
{{- default (printf "%s-ray-token" (include "whisper-serve.fullname" .)) .Values.rayAuth.existingSecret -}}
{{- end }}

{{- define "whisper-serve.redisSecret" -}}
{{- with .Values.faultTolerance -}}
{{- if .existingSecret -}}{{ .existingSecret }}{{- else if eq .redis "bundled" -}}{{ include "whisper-serve.fullname" $ }}-redis{{- end -}}
{{- end -}}
{{- end }}

{{/* The value of a chart's own secret that exists already (base64), else a new one: it must not change on upgrades. */}}
{{- define "whisper-serve.kept" -}}
{{- $there := lookup "v1" "Secret" .root.Release.Namespace .name -}}
{{- if and $there (hasKey (default dict $there.data) .key) -}}
{{- index $there.data .key -}}
{{- else -}}
{{- randAlphaNum 48 | b64enc -}}
{{- end -}}
{{- end }}

{{/* The groups of stage pods that the topology has, as a list of {name, stages, config}. */}}
{{- define "whisper-serve.groups" -}}
{{- $groups := list -}}
{{- if eq .Values.topology "colocated" -}}
{{- $groups = append $groups (dict "name" "colocated" "stages" (list "features" "encoder" "decoder") "config" .Values.groups.colocated) -}}
{{- else -}}
{{- range list "features" "encoder" "decoder" -}}
{{- $groups = append $groups (dict "name" . "stages" (list .) "config" (index $.Values.groups .)) -}}
{{- end -}}
{{- end -}}
{{- $groups | toJson -}}
{{- end }}

{{/* Components whose pods are Ray nodes. */}}
{{- define "whisper-serve.rayComponents" -}}
{{- $names := list "head" "api" -}}
{{- range include "whisper-serve.groups" . | fromJsonArray -}}{{- $names = append $names .name -}}{{- end -}}
{{- $names | toJson -}}
{{- end }}

{{- define "whisper-serve.raySelector" -}}
matchLabels:
  {{- include "whisper-serve.selectorLabels" . | nindent 2 }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: {{ include "whisper-serve.rayComponents" . }}}
{{- end }}

{{/* Replicas of a stage in one pod. */}}
{{- define "whisper-serve.perPod" -}}
{{- ternary .config.gpusPerPod 1 (eq .root.Values.device "cuda") | int -}}
{{- end }}

{{/* What a replica of each stage holds of a GPU, as JSON; in one place, for settings, policy and controller. */}}
{{- define "whisper-serve.gpuShares" -}}
{{- $shares := dict "features" 0.1 "encoder" 0.4 "decoder" 0.5 -}}
{{- $out := dict -}}
{{- range $stage, $share := $shares -}}
{{- if ne $.Values.device "cuda" -}}{{- $share = 0.0 -}}
{{- else if eq $.Values.topology "split" -}}{{- $share = 1.0 -}}
{{- else -}}
{{- $set := dig $stage "num_gpus" nil $.Values.settings -}}
{{- if not (kindIs "invalid" $set) -}}{{- $share = $set -}}{{- end -}}
{{- end -}}
{{- $_ := set $out $stage $share -}}
{{- end -}}
{{- $out | toJson -}}
{{- end }}

{{/* The policy's settings (serve_app/scaling/config.py) as JSON: thresholds as given, topology and limits from the groups. */}}
{{- define "whisper-serve.scaling" -}}
{{- $scaling := deepCopy (default dict .Values.settings.scaling) -}}
{{- $_ := set $scaling "topology" .Values.topology -}}
{{- range include "whisper-serve.groups" . | fromJsonArray -}}
{{- $perPod := include "whisper-serve.perPod" (dict "root" $ "config" .config) | int -}}
{{- $limits := dict "min_replicas" (mul (int .config.minReplicas) $perPod) "max_replicas" (mul (int .config.maxReplicas) $perPod) -}}
{{- $_ := set $scaling (ternary "pods" .name (eq .name "colocated")) $limits -}}
{{- end -}}
{{- $scaling | toJson -}}
{{- end }}

{{/* The application's settings as JSON: those of the values, and those that follow from the pods. */}}
{{- define "whisper-serve.settings" -}}
{{- $settings := deepCopy .Values.settings -}}
{{- $_ := unset $settings "scaling" -}}
{{- if eq .Values.autoscaling.by "serve" -}}
{{- $_ := set $settings "scaling" (set (include "whisper-serve.scaling" . | fromJson) "enabled" true) -}}
{{- end -}}
{{- $_ := set $settings "model" (set (default dict $settings.model) "device" .Values.device) -}}
{{- $shares := include "whisper-serve.gpuShares" . | fromJson -}}
{{- range include "whisper-serve.groups" . | fromJsonArray -}}
{{- $perPod := include "whisper-serve.perPod" (dict "root" $ "config" .config) | int -}}
{{- $replicas := mul (int .config.replicas) $perPod -}}
{{- range .stages -}}
{{- $stage := default dict (index $settings .) -}}
{{- $_ := set $stage "replicas" $replicas -}}
{{- $_ := set $stage "num_gpus" (index $shares .) -}}
{{- $_ := set $stage "resources" (dict (printf "stage_%s" .) 1) -}}
{{- $_ := set $stage "max_replicas_per_node" $perPod -}}
{{- $_ := set $settings . $stage -}}
{{- end -}}
{{- end -}}
{{- with .Values.api -}}
{{- $http := dict "replicas" (mul (int .replicas) (int .replicasPerPod)) "resources" (dict "api" 1) "max_replicas_per_node" (int .replicasPerPod) -}}
{{- if include "whisper-serve.apiKeysSecret" $ -}}
{{- $_ := set $http "api_keys_file" "/etc/whisper-serve/api-keys/keys" -}}
{{- end -}}
{{- $_ := set $settings "http" $http -}}
{{- end -}}
{{- $settings | toJson -}}
{{- end }}

{{/* Serve's configuration. */}}
{{- define "whisper-serve.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
applications:
  - name: whisper
    route_prefix: /
    import_path: serve_app.deployed:application
    {{- if eq .Values.autoscaling.by "controller" }}
    external_scaler_enabled: true
    {{- else if eq .Values.autoscaling.by "serve" }}
    autoscaling_policy:
      policy_function: serve_app.scaling.mount:ServePolicy
      policy_kwargs:
        gpus:
          {{- include "whisper-serve.gpuShares" . | fromJson | toYaml | nindent 10 }}
        scaling:
          {{- set (include "whisper-serve.scaling" . | fromJson) "enabled" true | toYaml | nindent 10 }}
    {{- end }}
    args:
      {{- include "whisper-serve.settings" . | fromJson | toYaml | nindent 6 }}
{{- end }}

{{/* Label matchers that pick this release's series. */}}
{{- define "whisper-serve.prometheusSelector" -}}
{{- if .Values.controller.prometheusSelector -}}
{{- .Values.controller.prometheusSelector -}}
{{- else if .Values.monitoring.enabled -}}
namespace="{{ .Release.Namespace }}",whisper_release="{{ .Release.Name }}"
{{- end -}}
{{- end }}
